"""Finds convolutions and linear layers in a torch.fx graph together with the norm, addition and activation behind them, and makes
each one call.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule, Node
from torch.nn import Module
from torch.nn.modules import activation, batchnorm, dropout
from torch.nn.utils import parametrize

from fastconv import nn
from fastconv._folding import activation_called, activation_of, why_not_folded
from fastconv.conversion import Kept
from fastconv.fusion import cascade, growing
from fastconv.fusion.cascade import FrozenCascade
from fastconv.fusion.frozen import FrozenConv2d, FrozenLinear, FrozenNorm
from fastconv.fusion.report import Report
from fastconv.fusion.walking import after, between, only_user

_DROPOUT_CALLS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
# What can be frozen, and what it becomes.
LAYERS = (torch.nn.Conv2d, torch.nn.Linear, nn.ConvBnAct)
_FROZEN = (FrozenConv2d, FrozenLinear, FrozenNorm, FrozenCascade)

_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_ADDITIONS_IN_PLACE = (operator.iadd, "add_")


def hooked(module: Module) -> bool:
    """Whether calling the module does more than its forward."""
    names = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return any(vars(module).get(name) for name in names)


def why_not_frozen(layer: Module) -> str:
    """Why this layer is not frozen; "" where it can be."""
    if any(special(part) for part in layer.modules()):
        return "it has hooks, parametrizations or a forward of its own"
    if isinstance(layer, nn.ConvBnAct):
        return why_not_folded(layer.norm)
    return "" if type(layer) in _EXACTLY else f"it is a subclass of {_kind(layer)}"


_EXACTLY = (torch.nn.Conv2d, nn.Conv2d, torch.nn.Linear, nn.Linear)


def _kind(layer: Module) -> str:
    return "Conv2d" if isinstance(layer, torch.nn.Conv2d) else "Linear"


def rewrite(root: Module, graph: Graph, name: str, report: Report) -> GraphModule:
    """The graph of ``root``, called ``name`` in the model, with frozen layers; what was done is added to the report."""
    return _Rewriting(root, graph, name, report).run()


@dataclass
class _Chain:
    """A layer and what its kernel takes over: nodes that are used by nothing but the next."""

    nodes: list[Node]
    layer: torch.nn.Conv2d | torch.nn.Linear
    norm: torch.nn.BatchNorm2d | None = None
    activation: str = "none"
    residual: Node | None = None

    @property
    def last(self) -> Node:
        return self.nodes[-1]


class _Rewriting:
    def __init__(self, root: Module, graph: Graph, name: str, report: Report) -> None:
        self.root, self.graph, self.report, self.prefix = root, graph, report, f"{name}." if name else ""
        self.modules: dict[str, Module] = dict(root.named_modules(remove_duplicate=False))
        self.frozen: dict[str, FrozenConv2d | FrozenLinear | FrozenNorm | FrozenCascade] = {}
        self.names: dict[tuple[Any, ...], str] = {}
        self.origins: dict[str, str] = {}  # by such a name, what the model calls the layer

    def run(self) -> GraphModule:
        for node in list(self.graph.nodes):
            self._drop(node)
        for node in list(self.graph.nodes):
            if isinstance(self._module(node), LAYERS):
                self._freeze(node)
        for node in list(self.graph.nodes):
            self._join_norm(node)
        for node in list(self.graph.nodes):
            self._grow(node)
        for calls in cascade.find(self.graph, self._module, self._writes):
            self._cascade(calls)
        for node in self.graph.nodes:
            self._list_if_left(node)
        parts: dict[str, Any] = {str(node.target): self._module(node) for node in self._nodes("call_module")}
        parts |= {
            str(node.target): operator.attrgetter(str(node.target))(self.root) for node in self._nodes("get_attr")
        }
        frozen = GraphModule(parts, self.graph)
        frozen.training = (
            False  # not by eval(), which would reach the parts, and one may be in training mode on purpose
        )
        return frozen

    def _nodes(self, op: str) -> Iterator[Node]:
        return (node for node in self.graph.nodes if node.op == op)

    def _module(self, node: Node) -> Module | None:
        if node.op != "call_module":
            return None
        target = str(node.target)
        return self.frozen[target] if target in self.frozen else self.modules[target]

    def _drop(self, node: Node) -> None:
        """Takes out what does nothing in eval mode."""
        module = self._module(node)
        if isinstance(module, (dropout._DropoutNd, torch.nn.Identity)):
            nothing = not module.training and not special(module)
        else:
            # torchvision's stochastic depth is a function that torch.fx does not look into; torchvision need not be there.
            name = getattr(node.target, "__name__", "")
            training = node.args[3] if len(node.args) > 3 else node.kwargs.get("training")
            nothing = training is False and (node.target in _DROPOUT_CALLS or name == "stochastic_depth")
        if nothing:
            node.replace_all_uses_with(node.all_input_nodes[0])
            self.graph.erase_node(node)

    # ---- One chain --------------------------------------------------------------------------------------------------------

    def _freeze(self, node: Node) -> None:
        reason = self._why_not(node)
        if reason:
            self._leave(node, reason)
            return
        chain = self._chain(node)
        args = (node.args[0],) if chain.residual is None else (node.args[0], chain.residual)
        # Where nothing is added, the call stays where the layer was: its input may be written to later.
        with self.graph.inserting_before(node if chain.residual is None else chain.last):
            call = self.graph.call_module(self._frozen(chain), args)
        chain.last.replace_all_uses_with(call)
        for old in reversed(chain.nodes):
            self.graph.erase_node(old)
        self._count(chain)

    def _why_not(self, node: Node) -> str:
        """Why the layer of a node is left as it is; "" where it is frozen."""
        if not isinstance(node.args[0] if node.args else None, Node):
            return "its input is passed by keyword"
        module = self._module(node)
        assert module is not None
        return why_not_frozen(module)

    def _chain(self, node: Node) -> _Chain:
        module = self._module(node)
        if isinstance(module, nn.ConvBnAct):
            chain = _Chain([node], module.conv, module.norm, module.activation)
            given = node.args[1:] + tuple(node.kwargs.values())
            if given and given[0] is not None:
                chain.residual = given[0]  # type: ignore[assignment]
                return chain
        else:
            assert isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))
            chain = _Chain([node], module)
            self._take_norm(chain)
        if chain.activation == "none":
            self._take_addition(chain)
            self._take_activation(chain)
        return chain

    def _take_norm(self, chain: _Chain) -> None:
        if not isinstance(chain.layer, torch.nn.Conv2d):
            return  # behind a linear layer, BatchNorm1d means other channels for every rank of its input
        user = only_user(chain.last)
        module = None if user is None else self._module(user)
        if user is None or not isinstance(module, torch.nn.BatchNorm2d) or special(module) or why_not_folded(module):
            return
        if user.args != (chain.last,) or user.kwargs:
            return  # ours may add something, or be given this as what it adds
        chain.norm = module
        chain.nodes.append(user)

    def _take_addition(self, chain: _Chain) -> None:
        add = only_user(chain.last)
        if add is None or add.target not in _ADDITIONS or add.kwargs or len(add.args) != 2:
            return
        first, second = add.args
        other = second if first is chain.last else first
        if not isinstance(other, Node) or other is chain.last:
            return
        if add.target in _ADDITIONS_IN_PLACE and first is other and not self._is_fresh(other):
            return  # others see what is written into it
        if self._ends_later_chain(other, chain.last):
            return  # that one takes the addition: the result of this one is there by then
        if any(self._writes(node) for node in between(chain.nodes[0], add) if node not in chain.nodes):
            return  # the input or the other summand may be something else by then
        chain.residual = other
        chain.nodes.append(add)

    def _take_activation(self, chain: _Chain) -> None:
        user = only_user(chain.last)
        name = None if user is None else self._activation(user)
        if user is not None and name is not None:
            chain.activation = name
            chain.nodes.append(user)

    def _activation(self, node: Node) -> str | None:
        module = self._module(node)
        if module is not None:
            return None if special(module) else activation_of(module)
        return activation_called(node.target, node.kwargs) if node.op in ("call_function", "call_method") else None

    def _is_fresh(self, node: Node) -> bool:
        """Whether nothing but its one user sees the memory of a node's result."""
        made_anew = torch.nn.Conv2d, torch.nn.Linear, batchnorm._BatchNorm, *_FROZEN
        return isinstance(self._module(node), made_anew) and only_user(node) is not None

    def _ends_later_chain(self, node: Node, than: Node) -> bool:
        """Whether a layer that runs after ``than`` could add something to its result, ``node``."""
        layer = node
        if isinstance(self._module(node), torch.nn.BatchNorm2d) and node.all_input_nodes:
            layer = node.all_input_nodes[0]
        if not isinstance(self._module(layer), LAYERS) or self._why_not(layer) or layer not in after(than):
            return False
        reached = self._chain_before_addition(layer)
        return reached is node and only_user(node) is not None

    def _chain_before_addition(self, layer: Node) -> Node | None:
        module = self._module(layer)
        if isinstance(module, nn.ConvBnAct):
            return layer if module.activation == "none" and len(layer.args) + len(layer.kwargs) == 1 else None
        chain = _Chain([layer], module)  # type: ignore[arg-type]
        self._take_norm(chain)
        return chain.last

    def _writes(self, node: Node) -> bool:
        """Whether a node may change a tensor that exists. Modules made of others are not looked into, so they may."""
        if node.op == "call_module":
            module = self._module(node)
            assert module is not None
            known = isinstance(module, _FROZEN) or type(module).__module__.startswith(("torch.nn.", "fastconv.nn"))
            return not known or special(module) or bool(getattr(module, "inplace", False))
        if node.op in ("call_function", "call_method"):
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
            in_place = (name.endswith("_") and not name.endswith("__")) or name in ("setitem", *_IN_PLACE_OPERATORS)
            return in_place or bool(node.kwargs.get("inplace")) or "out" in node.kwargs
        return False

    def _join_norm(self, node: Node) -> None:
        """Makes a norm that no convolution took, and the activation behind it, one call."""
        module, user = self._module(node), only_user(node)
        name = None if user is None else self._activation(user)
        if user is None or name is None or len(node.args) != 1 or node.kwargs:
            return
        if not isinstance(module, torch.nn.BatchNorm2d) or special(module) or why_not_folded(module):
            return
        key = id(module), name
        if key not in self.names:
            self.names[key] = self._new_name(str(node.target))
            self.frozen[self.names[key]] = FrozenNorm(module, name)
        with self.graph.inserting_before(node):
            call = self.graph.call_module(self.names[key], node.args)
        user.replace_all_uses_with(call)
        self.graph.erase_node(user)
        self.graph.erase_node(node)
        self.report.joined.append(f"{self.prefix}{node.target}")
        self.report.activations[name] += 1

    # ---- Concatenations ---------------------------------------------------------------------------------------------------

    def _grow(self, first: Node) -> None:
        """Makes a chain of concatenations, each of the one before and a frozen convolution's result, grow in one memory."""
        parts = self._parts(first)
        if parts is None or len(parts) != 2 or self._previous(first) is not None:
            return
        chain = [first]
        while following := self._next(chain[-1]):
            chain.append(following)
        if any(self._writes(user) for user in chain[-1].users):
            chain.pop()  # earlier ones are part of the same memory
        if len(chain) < 2:
            return
        behind = [cast(list[Node], self._parts(node))[-1] for node in chain]
        room = sum(cast(FrozenConv2d, self._module(node)).weight.shape[0] for node in behind[1:])
        first.target, first.args = growing.begin, (*parts, room)
        for before, node, more in zip(chain, chain[1:], behind[1:]):
            node.target, node.args = growing.extend, (before, more)
        for node in chain:
            node.kwargs = {}
        self.report.grown.append(f"{self.prefix}{first.name}")

    def _parts(self, node: Node) -> list[Node] | None:
        """What this node puts behind each other, a frozen convolution's result last; None where it does not."""
        if node.op != "call_function" or node.target not in (torch.cat, torch.concat):
            return None
        parts, *dim = (*node.args, *node.kwargs.values())
        if dim != [1] or not isinstance(parts, (tuple, list)) or len(parts) < 2:
            return None
        nodes = [part for part in parts if isinstance(part, Node)]
        if len(set(nodes)) < len(parts):
            return None
        return nodes if isinstance(self._module(nodes[-1]), FrozenConv2d) else None

    def _previous(self, node: Node) -> Node | None:
        """The concatenation that this one is with more behind it, unless something could see the memory behind it change."""
        parts = self._parts(node)
        if parts is None:
            return None
        *before, _ = parts
        # The one before by itself, or all that it was made of.
        found = before if len(before) == 1 else [user for user in before[0].users if self._parts(user) == before]
        if len(found) != 1 or self._parts(found[0]) is None:
            return None
        others = (user for user in found[0].users if user is not node)
        readers = (FrozenNorm, FrozenConv2d)  # which take channels where they lie
        return found[0] if all(isinstance(self._module(user), readers) for user in others) else None

    def _next(self, node: Node) -> Node | None:
        users = dict.fromkeys((*node.users, *cast(list[Node], self._parts(node))[0].users))
        following = [user for user in users if self._previous(user) is node]
        return following[0] if len(following) == 1 else None  # a second would write to the same place

    # ---- Cascades ---------------------------------------------------------------------------------------------------------

    def _cascade(self, calls: list[Node]) -> None:
        """Makes calls of frozen convolutions one call, which takes them band by band."""
        key = tuple(str(node.target) for node in calls)
        if key not in self.names:
            self.names[key] = self._new_name(self.origins[key[0]])
            self.frozen[self.names[key]] = FrozenCascade([cast(FrozenConv2d, self._module(node)) for node in calls])
        with self.graph.inserting_before(calls[-1]):
            call = self.graph.call_module(self.names[key], (calls[0].args[0], *calls[-1].args[1:]))
        calls[-1].replace_all_uses_with(call)
        for node in reversed(calls):
            self.graph.erase_node(node)
        self.report.cascades.append(self.prefix + self.origins[key[0]])

    # ---- Results ----------------------------------------------------------------------------------------------------------

    def _frozen(self, chain: _Chain) -> str:
        """The name of the frozen layer; calls that share their layers share it."""
        target = str(chain.nodes[0].target)
        key = id(chain.layer), id(chain.norm), chain.activation
        if key not in self.names:
            self.names[key] = self._new_name(target)
            self.frozen[self.names[key]] = (
                FrozenConv2d(chain.layer, chain.norm, chain.activation)
                if isinstance(chain.layer, torch.nn.Conv2d)
                else FrozenLinear.of(chain.layer, chain.activation)
            )
        return self.names[key]

    def _new_name(self, target: str) -> str:
        # Flat: every dot is a lookup that misses first, in each call of the model.
        name = f"frozen_{len(self.names)}_{target.replace('.', '_')}"
        self.origins[name] = target
        return name

    def _count(self, chain: _Chain) -> None:
        name = self.prefix + str(chain.nodes[0].target)
        (self.report.frozen if isinstance(chain.layer, torch.nn.Conv2d) else self.report.linears).append(name)
        if chain.norm is not None:
            self.report.norms.append(name)
        if chain.residual is not None:
            self.report.residuals.append(name)
        if chain.activation != "none":
            self.report.activations[chain.activation] += 1

    def _leave(self, node: Node, reason: str) -> None:
        self.report.left.append(Kept(f"{self.prefix}{node.target}", type(self._module(node)).__name__, reason))

    def _list_if_left(self, node: Node) -> None:
        module = self._module(node)
        before = self._module(node.all_input_nodes[0]) if node.all_input_nodes else None
        if isinstance(module, batchnorm._NormBase):
            self._leave(node, why_not_folded(module) or "there is no convolution before it that nothing else uses")
        elif isinstance(before, _FROZEN) and type(module).__module__ == activation.__name__:
            named = module is not None and activation_of(module)
            self._leave(
                node, "what it is given has other uses" if named else "the kernels' epilogue has no such activation"
            )


_IN_PLACE_OPERATORS = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")


def special(module: Module) -> bool:
    """Whether calling a layer is more than the layer."""
    return hooked(module) or "forward" in vars(module) or parametrize.is_parametrized(module)
