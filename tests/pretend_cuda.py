"""
A pretended GPU: real numbers on the CPU that carry the label "cuda", on any machine.

Inside `with PretendCuda() as gpu:` .to("cuda"), device="cuda" and x.device work, and what a real GPU
refuses is refused with MixedDevices: tensors of two devices in one operation (except scalars and
indices on the CPU), and .numpy() of a tensor on the GPU. gpu.waits counts where the CPU would wait
for the GPU, gpu.copies what would be copied between them, {(what, file:line): times}; gpu.launches
counts kernels. The label belongs to a storage, so views share it.
"""
import collections
import contextlib
import sys
from pathlib import Path
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

Tensor = torch.Tensor
CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
ROOT = str(Path(__file__).resolve().parent.parent)
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "bincount",
         "repeat_interleave", "linalg_qr", "_linalg_svd"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
COPYING = {"_to_copy", "clone", "copy_", "lift_fresh", "lift"}
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "alias",
        "lift_fresh", "_local_scalar_dense", "is_same_size", "resize_", "set_", "_unsafe_view"}


class MixedDevices(RuntimeError):
    """What CUDA would refuse"""


def caller():
    """file:line of the repository that is being executed."""
    frame = sys._getframe(2)
    while frame:
        path = frame.f_code.co_filename
        if path.startswith(ROOT) and "pretend_cuda" not in path and "site-packages" not in path:
            return f"{Path(path).name}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


class Functions(TorchFunctionMode):
    """Above autograd: calls that name a device or ask for one."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, function, types, args=(), kwargs=None):
        gpu = self.gpu
        kwargs = dict(kwargs or {})
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if first is not None:
            if function == Tensor.device.__get__:
                return gpu.label(first)
            if function == Tensor.is_cuda.__get__:
                return gpu.label(first) == CUDA
            if function in (Tensor.numpy, Tensor.__array__) and gpu.label(first) == CUDA:
                raise MixedDevices(f"{caller()}: .numpy() of a tensor on the GPU; .cpu() first")
        if function is Tensor.cpu:
            function, args, kwargs = Tensor.to, (first, "cpu"), {}
        if function is Tensor.cuda:
            function, args, kwargs = Tensor.to, (first, "cuda"), {}
        target = kwargs.pop("device", None)
        if function is Tensor.to and len(args) > 1 and isinstance(args[1], (str, torch.device)):
            target = args[1]
            if len(args) > 2 and args[2] is not None:
                kwargs["dtype"] = args[2]
            args = args[:1]
        if target is None:
            before = gpu.default
            on_gpu = [gpu.label(x) == CUDA for x in tree_iter(args) if isinstance(x, Tensor)]
            gpu.default = CUDA if any(on_gpu) else CPU      # of what the call makes on its way
            try:
                return function(*args, **kwargs)
            finally:
                gpu.default = before
        target = CUDA if torch.device(target).type == "cuda" else CPU
        if function is Tensor.to:
            if gpu.label(first) == target and not kwargs.get("dtype") and len(args) == 1:
                return first
            kwargs["copy"] = True
            gpu.copies["to GPU" if target == CUDA else "to CPU", caller()] += 1
        elif function is torch.tensor and target == CUDA:
            gpu.copies["to GPU", caller()] += 1
        before, gpu.target = gpu.target, target
        try:
            return function(*args, **kwargs, device=CPU)
        finally:
            gpu.target = before


class Kernels(TorchDispatchMode):
    """Below autograd: every operation that a GPU would run, of the backward pass too."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        gpu = self.gpu
        kwargs = kwargs or {}
        name = function._schema.name.split("::")[1]
        inputs = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        labels = {gpu.label(x) for x in inputs}
        is_copy = name in COPYING and gpu.target is not None
        label = gpu.target or gpu.default
        if inputs and not is_copy:
            label = CUDA if CUDA in labels else CPU
            if name.endswith("_like") and gpu.target is not None:
                label = gpu.target
        if len(labels) == 2 and not is_copy:
            label = self.check_mixed(name, args, inputs)
        result = function(*args, **kwargs)
        for x in tree_iter(result):
            if isinstance(x, Tensor):
                gpu.set_label(x, label)
        if CUDA in labels or label == CUDA:
            is_view = any(r.alias_info and not r.alias_info.is_write
                          for r in function._schema.returns)
            if not is_view and name not in FREE:
                gpu.launches += 1
            by_mask = name in INDEXING and any(isinstance(i, Tensor) and i.dtype == torch.bool
                                               for i in args[1])
            if name in WAITS or by_mask:
                gpu.waits[name, caller()] += 1
        return result

    def check_mixed(self, name, args, inputs):
        gpu = self.gpu
        on_cpu = [x for x in inputs if gpu.label(x) == CPU]
        if name == "copy_":                                 # x[...] = y of the other device
            gpu.copies["copy_", caller()] += 1
            return gpu.label(args[0])
        is_index = name in INDEXING and gpu.label(args[0]) == CUDA
        if is_index and all(any(x is i for i in tree_iter(args[1])) or x.dim() == 0 for x in on_cpu):
            gpu.copies["index to GPU", caller()] += 1
        elif any(x.dim() > 0 for x in on_cpu) or name in ("mm", "addmm", "bmm", "cat", "stack"):
            shapes = ", ".join(f"{gpu.label(x)} {tuple(x.shape)}" for x in inputs)
            raise MixedDevices(f"{caller()}: {name}: {shapes}")
        return CUDA


class PretendCuda:
    storages = {}               # address of a storage on the GPU: a weak reference to it

    def __init__(self):
        self.target = None      # device that the call in progress names
        self.default = CPU      # device of what operations without inputs make
        self.launches = 0
        self.waits = collections.Counter()
        self.copies = collections.Counter()

    def label(self, x):
        with torch._C.DisableTorchFunction():
            return CUDA if x.untyped_storage()._cdata in self.storages else CPU

    def set_label(self, x, label):
        storage = x.untyped_storage()
        if label == CPU:
            self.storages.pop(storage._cdata, None)
        elif storage._cdata not in self.storages:
            self.storages[storage._cdata] = StorageWeakRef(storage)     # keeps the address its own

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        state = torch.zeros(16, dtype=torch.uint8)
        for module, name, value in (
                (torch.cuda, "is_available", lambda: True),
                (torch.cuda, "mem_get_info", lambda *_: (2 ** 40, 2 ** 40)),
                (torch.cuda, "get_rng_state", lambda *_: state),
                (torch.cuda, "set_rng_state", lambda *_: None),
                (torch.cuda, "manual_seed_all", lambda _: None),
                (torch.random, "fork_rng", fork_rng),
                (torch.nn.utils.clip_grad, "_device_has_foreach_support", lambda _: True),
                (torch.nn.utils.clip_grad, "_group_tensors_by_device_and_dtype", group_tensors)):
            self.stack.enter_context(mock.patch.object(module, name, value))
        self.stack.enter_context(Functions(self))
        self.stack.enter_context(Kernels(self))
        return self

    def __exit__(self, *error):
        return self.stack.__exit__(*error)


def group_tensors(lists, *_, group=torch.utils._foreach_utils._group_tensors_by_device_and_dtype):
    """As PyTorch's, which looks at the real device: the device of each group's first tensor."""
    groups = group(lists)
    return {(parts[0][0].device, dtype): (parts, indices)
            for (_, dtype), (parts, indices) in groups.items()}


@contextlib.contextmanager
def fork_rng(*_, **__):
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)
