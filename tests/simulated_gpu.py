"""Runs a script on a simulated GPU, for tests on machines without one: simulated_gpu.py SCRIPT [arguments].

The device is called fakegpu (PyTorch's PrivateUse1). Each of its tensors computes in a tensor on the CPU. As with CUDA,
an operation on tensors of both devices raises and the device has a random generator of its own. Copies between device
and host are counted, and printed as the last line. With SIMULATED_GPU_FAILS_AT=N every operation on the device after N
backward passes fails, as after an illegal memory access; with SIMULATED_GPU_LARGEST_TENSOR=N its memory is exhausted by
a tensor of more than N elements. Autocast (--bfloat16) does not work on it.

The script runs as a copy in ./copies/, in which "cuda" is fakegpu.
"""

import contextlib
import importlib.util
import json
import os
import sys
import types
from collections import Counter
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the scripts do, before PyTorch is loaded
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "fakegpu"
FAILS_AT = int(os.environ.get("SIMULATED_GPU_FAILS_AT", -1))
LARGEST_TENSOR = int(os.environ.get("SIMULATED_GPU_LARGEST_TENSOR", 2**62))
READING = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero", "aten::masked_select"}
counts = Counter()
generator = torch.Generator()


def make_module() -> types.ModuleType:
    """What torch.cuda is for CUDA, as far as the scripts and PyTorch ask for it."""
    module = types.ModuleType(f"torch.{NAME}")
    module.is_available = lambda: True
    module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module._lazy_init = lambda: None
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.manual_seed = generator.manual_seed
    module.manual_seed_all = generator.manual_seed
    module.get_rng_state = lambda device=None: generator.get_state()
    module.set_rng_state = lambda state, device=None: generator.set_state(state)
    module.mem_get_info = lambda device=None: (8 * 10**9, 10**11)
    module.get_device_name = lambda device=None: "simulated"
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]  # asked for even where autocast is off
    module.empty_cache = lambda: None
    module.OutOfMemoryError = torch.OutOfMemoryError
    return module


_setup_privateuseone_for_python_backend(NAME, make_module())
DEVICE = torch.device(NAME, 0)


class DeviceTensor(torch.Tensor):
    """A tensor on the simulated device; `inner` is the CPU tensor that holds its numbers."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )

    def __init__(self, inner):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})

    def tolist(self):
        return self.cpu().tolist()

    def __repr__(self):
        return f"DeviceTensor({self.inner})"


class SimulatedDevice(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


@contextlib.contextmanager
def device_generator():
    """Random numbers come from the device's own generator inside."""
    host_state = torch.get_rng_state()
    torch.set_rng_state(generator.get_state())
    yield
    generator.set_state(torch.get_rng_state())
    torch.set_rng_state(host_state)


def dispatch(function, args, kwargs):
    """Compute an operation with the CPU tensors inside, check where its tensors are, and count copies."""
    with torch.inference_mode(False), torch.no_grad():  # a tensor inside is always a plain one
        wrappers = {}
        found = Counter()

        def unwrap(x):
            if isinstance(x, DeviceTensor):
                found["device"] += 1
                wrappers[id(x.inner)] = x
                return x.inner
            if isinstance(x, torch.Tensor):
                found["host"] += x.dim() > 0  # CUDA, too, takes single numbers from the host
            return torch.device("cpu") if isinstance(x, torch.device) else x

        inner_args, inner_kwargs = tree_map(unwrap, (args, kwargs))
        to_device = is_result_on_device(function, args, kwargs, found)
        if (found["device"] or to_device) and 0 <= FAILS_AT < counts["backward"]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered (simulated)")
        count_copies(function, args, found, to_device)
        draws = torch.Tag.nondeterministic_seeded in function.tags and to_device
        with device_generator() if draws else contextlib.nullcontext():
            result = function(*inner_args, **inner_kwargs)
        if not to_device:
            return result

        def wrap(x):
            if not isinstance(x, torch.Tensor):
                return x
            if x.numel() > LARGEST_TENSOR:
                raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
            return wrappers[id(x)] if id(x) in wrappers else DeviceTensor(x)

        return tree_map(wrap, result)


def is_result_on_device(function, args, kwargs, found) -> bool:
    if function._schema.name == "aten::copy_":
        return isinstance(args[0], DeviceTensor)
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"]).type == NAME
    return found["device"] > 0


def count_copies(function, args, found, to_device) -> None:
    name = function._schema.name
    source = None
    if name == "aten::copy_":
        source = args[1]
    elif name in ("aten::_to_copy", "aten::to"):
        source = args[0]
    elif found["device"] and found["host"]:
        raise RuntimeError(f"{name}: tensors of both devices")
    if source is not None and isinstance(source, DeviceTensor) != to_device:
        counts["to the device" if to_device else "to the host"] += 1
    if name in READING and found["device"]:
        counts["to the host"] += 1


def count_backward_passes() -> None:
    backward = torch.Tensor.backward

    def counted(*args, **kwargs):
        counts["backward"] += 1
        return backward(*args, **kwargs)

    torch.Tensor.backward = counted


def load_copy(path: Path) -> types.ModuleType:
    """The script as a module in which "cuda" is the simulated device, but for the argument of that name."""
    source = path.read_text().replace('"cuda"', f'"{NAME}"').replace("torch.cuda.", f"torch.{NAME}.")
    argument_before = '"num_eval_episodes", ' if path.name.startswith("ppo") else '"video_path", '
    source = source.replace(f'{argument_before}"{NAME}"', f'{argument_before}"cuda"')
    copy = Path("copies", path.name).resolve()
    copy.parent.mkdir(exist_ok=True)
    copy.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, copy)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def main() -> int:
    path, sys.argv = Path(sys.argv[1]), sys.argv[1:]
    torch.set_num_threads(1)
    script = load_copy(path)
    count_backward_passes()
    try:
        with SimulatedDevice():
            return script.main() or 0
    finally:
        print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    sys.exit(main())
