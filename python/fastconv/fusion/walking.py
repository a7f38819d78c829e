"""Ways through a torch.fx graph."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node


def only_user(node: Node) -> Node | None:
    """The one node that uses this one, or None where there is none or more."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def after(node: Node) -> Iterator[Node]:
    """What runs after this node."""
    while node.next.op != "root":
        node = node.next
        yield node


def between(first: Node, last: Node) -> Iterator[Node]:
    """What runs after ``first`` and before ``last``."""
    for node in after(first):
        if node is last:
            return
        yield node
