"""Where kernels come from: those at hand, those that another process compiles, or made now."""

from collections.abc import Hashable

import torch

from lightning_dsmoe.inference.engine.decode import kernel_index
from lightning_dsmoe.inference.engine.decode.aot_cache import Kernel, Part
from lightning_dsmoe.inference.engine.decode.beside import Compilation, is_at_work, start
from lightning_dsmoe.inference.engine.decode.compiled_step import NotReady, kernels_of
from lightning_dsmoe.inference.engine.decode.same_graph import Known


class KernelSource:
    """Gives the kernels of parts, and keeps them for parts alike, as those of another k."""

    def __init__(self) -> None:
        self._known: list[Known] = []
        self._beside: dict[Hashable, Compilation] = {}

    def is_waiting(self, key: Hashable) -> bool:
        """Whether asking without waiting would be in vain: something is being compiled beside."""
        beside = self._own(key)
        return is_at_work() if beside is None else beside.is_running

    def get(
        self,
        key: Hashable,
        wait: bool,
        parts: dict[object, Part],
        what: str,
        device: torch.device,
    ) -> dict[object, Kernel]:
        """Kernels of parts.

        Args:
            key: the name under which they are asked for again when they are not ready.
            wait: compile now rather than beside.
            parts: the parts, by any names.
            what: what the user is told is compiled.
            device: where they run.

        Raises:
            NotReady: if another process compiles.
            Exception: if they cannot be compiled.
        """
        if (found := self._at_hand(parts)) is not None:
            self._beside.pop(key, None)
            return found
        beside = self._own(key)
        if beside is None and (kernels := kernel_index.recall(list(parts.values()))) is not None:
            found = dict(zip(parts, kernels, strict=True))
            self._remember(parts, found)
            return found
        if beside is None and not wait:
            if (beside := start(list(parts.values()))) is None:
                raise NotReady
            self._beside[key] = beside
        if beside is None:
            found = kernels_of(parts, what, device)
        elif beside.is_running and not wait:
            raise NotReady
        else:
            found = self._beside.pop(key).kernels(parts, what, device)
        self._remember(parts, found)
        return found

    def _own(self, key: Hashable) -> Compilation | None:
        """What this process, and not one that it was forked from, compiles under a key."""
        beside = self._beside.get(key)
        return beside if beside is not None and beside.is_own else None

    def _remember(self, parts: dict[object, Part], found: dict[object, Kernel]) -> None:
        self._known += [Known.of(part, found[name]) for name, part in parts.items()]

    def _at_hand(self, parts: dict[object, Part]) -> dict[object, Kernel] | None:
        """Kernels that are here already; None if one is missing."""
        found = {}
        for name, part in parts.items():
            known = next((each for each in self._known if each.fits(part)), None)
            if known is None:
                return None
            found[name] = known.kernel
        return found
