"""Which operations would make the host wait for a GPU, counted on any device."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode


class HostReads(TorchDispatchMode):
    """Counts the operations that would make the host wait for a GPU: a value becomes a Python number, a shape depends on
    values, or a tensor is copied to the host."""

    READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        if any(name.startswith(read) for read in self.READS):
            self.counted[name] += 1
        return function(*arguments, **(options or {}))
