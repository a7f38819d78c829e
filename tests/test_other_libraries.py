"""Attention inside timm's and torchvision's models: what `convert` reaches, and what the block `fastconv.sdpa()` does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import fastconv


class Attention(nn.Module):
    """As timm writes it: one projection to queries, keys and values, norms of each head, and torch's function by its name."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = nn.LayerNorm(width // num_heads), nn.LayerNorm(width // num_heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask=attn_mask, dropout_p=0.0)
        out: Tensor = self.proj(y.transpose(1, 2).flatten(2))
        return out


@pytest.mark.parametrize("masked", [False, True])
def test_attention_as_timm_writes_it(masked: bool) -> None:
    torch.manual_seed(0)
    layer, x = Attention(48, 3), torch.randn(2, 17, 48, requires_grad=True)
    mask = torch.rand(17, 17) > 0.3 if masked else None
    leaves = [x, *layer.parameters()]
    expected = layer(x, mask)
    wanted = torch.autograd.grad(expected.sin().sum(), leaves)
    assert fastconv.convert(layer).swapped == {"Linear": 2, "LayerNorm": 2}
    before = fastconv.fallback_counts()
    with fastconv.sdpa(), fastconv.observe() as records:
        found = layer(x, mask)
    assert [r.op for r in records if r.op.startswith("sdpa")] == ["sdpa_fwd"]
    assert fastconv.fallback_counts() == before
    assert_close(found, expected)
    assert_close(torch.autograd.grad(found.sin().sum(), leaves), wanted, rtol=1e-4, atol=1e-5)


def test_timm() -> None:
    models = pytest.importorskip("timm.models.vision_transformer", reason="timm is not installed")
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
    model, x = models.VisionTransformer(**sizes).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        fastconv.convert(model)
        with fastconv.sdpa(), fastconv.observe() as records:
            found = model(x)
    assert [r.op for r in records].count("sdpa_fwd") == 2
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_torchvision() -> None:
    """ViT-B/16 converted, and ours with its weights."""
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    torch.manual_seed(0)
    theirs, x = models.vit_b_16().eval(), torch.randn(1, 3, 224, 224)
    nn.init.normal_(theirs.heads.head.weight, std=0.02)  # a fresh one's is 0, and every encoder would do
    ours = fastconv.models.create("vit_b_16").eval()
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        expected = theirs(x)
        assert fastconv.convert(theirs).swapped["MultiheadAttention"] == 12
        for model in (theirs, ours):
            with fastconv.observe() as records:
                found = model(x)
            assert [r.op for r in records].count("sdpa_fwd") == 12
            assert_close(found, expected, rtol=1e-3, atol=1e-4)
