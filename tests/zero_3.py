"""DeepSpeed's ZeRO-3 as far as a head meets it, for tests without DeepSpeed: a parameter in parts, whole in a gather.

What DeepSpeed does, in its words: a partitioned parameter has ds_id, ds_shape and ds_status, and empty data; a gather
gives it new data, and its end empties it again; a gradient is reduced as it is accumulated, where the data must be
whole; a module's hooks gather its parameters before its backward.
"""

import contextlib
import enum
import math
import sys
import types
from unittest import mock

import torch
import torch.distributed as dist


class ZeroParamStatus(enum.Enum):
    """Where a parameter's data is."""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


def partition(*parameters):
    """Keep of each parameter this rank's part, and of its gradient the mean over ranks, as `ds_grad`, whole."""
    for at, parameter in enumerate(parameters):
        parameter.ds_id, parameter.ds_shape, parameter.ds_grad = at, parameter.shape, None
        size = math.ceil(parameter.numel() / dist.get_world_size())
        padded = torch.zeros(size * dist.get_world_size(), dtype=parameter.dtype)
        padded[: parameter.numel()] = parameter.detach().flatten()
        parameter.ds_tensor = padded.split(size)[dist.get_rank()].clone()
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_reduced)
    release(*parameters)


def gather(*parameters):
    """Give each parameter its whole data."""
    for parameter in parameters:
        parts = [torch.empty_like(parameter.ds_tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, parameter.ds_tensor)
        parameter.data = torch.cat(parts)[: parameter.ds_shape.numel()].view(parameter.ds_shape)
        parameter.ds_status = ZeroParamStatus.AVAILABLE


def release(*parameters):
    """Empty each parameter."""
    for parameter in parameters:
        parameter.data = torch.empty(0, dtype=parameter.dtype)
        parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE


def hooked(module):
    """Gather a module's parameters for its forward, and again where its backward starts, as DeepSpeed's hooks do."""
    parameters = list(module.parameters(recurse=False))

    def after(_module, _given, found):
        release(*parameters)
        if found.requires_grad:
            found.register_hook(lambda _: gather(*parameters))

    partition(*parameters)
    module.register_forward_pre_hook(lambda *_: gather(*parameters))
    module.register_forward_hook(after)


@contextlib.contextmanager
def gathered(parameters):
    """deepspeed.zero.GatheredParameters."""
    assert all(parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE for parameter in parameters)
    gather(*parameters)
    try:
        yield
    finally:
        release(*parameters)


@contextlib.contextmanager
def enabled():
    """Transformers and TRL take this for DeepSpeed."""
    place = "deepspeed.runtime.zero.partition_parameters"
    found = {
        name: types.ModuleType(name) for name in ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.zero", place)
    }
    found["deepspeed"].zero = types.SimpleNamespace(GatheredParameters=gathered)
    found[place].ZeroParamStatus = ZeroParamStatus
    asked = "transformers.integrations.deepspeed.is_deepspeed_zero3_enabled"
    with mock.patch.dict(sys.modules, found), mock.patch(asked, lambda: True):
        yield


def _reduced(parameter):
    dist.all_reduce(parameter.grad)
    parameter.ds_grad, parameter.grad = parameter.grad / dist.get_world_size(), None
