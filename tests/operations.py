"""What runs beneath PyTorch's functions, to test the structure of fast code without a clock."""

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Operations(TorchDispatchMode):
    """Notes which operations run, and the most elements of any tensor that they make."""

    VIEWS = {"view", "_unsafe_view", "transpose", "expand", "unsqueeze", "permute", "t", "alias", "detach"}

    def __init__(self):
        super().__init__()
        self.names, self.numel = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.names.append(str(function))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(output) if hasattr(leaf, "numel"))])
        return output

    def kernels(self):
        """Those that compute or copy something."""
        return [name for name in self.names if name.split(".")[1] not in self.VIEWS]
