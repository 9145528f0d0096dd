"""Weights in shards: fully sharded data parallelism (FSDP 2, arXiv 2304.11277), as accelerate's plugin sets it up.

Each process holds its part of every weight, gradient and moment. A layer is whole only while a pass runs through it:
its parts are gathered from all processes before the forward pass and again before the backward pass. So all processes
have to take the same passes in the same order, also one that has nothing left to do (`any_process`).

The model itself is sharded, not the module around it that computes the loss: rollouts, adversary and validation call
it too. All that training has to know of shards is here.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from ..core.errors import UsageError
from ..models.huggingface import HuggingFaceVLM
from ..models.loading import unwrapped
from ..models.prefix import Prefix
from ..models.selfcheck import probe_batch


def set_up(accelerator: Accelerator) -> None:
    """Check what the launcher asks for. Raises UsageError where its FSDP settings are none that training can work with.

    On CPUs accelerate ignores them and would train on whole weights; here they count as on GPUs.
    """
    state = accelerator.state
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if asked and state.distributed_type == DistributedType.MULTI_CPU:
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        for part in (AcceleratorState, PartialState):
            part._shared_state["distributed_type"] = DistributedType.FSDP
    if accelerator.distributed_type == DistributedType.FSDP:
        _check(state.fsdp_plugin)


def _check(plugin: FullyShardedDataParallelPlugin) -> None:
    wanted = [
        (
            plugin.fsdp_version == 2,
            "fsdp_version: 2",
            "version 1 flattens weights, and cannot freeze them for an attack",
        ),
        (
            plugin.reshard_after_forward is True,
            "fsdp_reshard_after_forward: true",
            "weights are frozen for an attack, and exchanged for the reference's, while they are in shards",
        ),
        (
            not plugin.cpu_ram_efficient_loading,
            "fsdp_cpu_ram_efficient_loading: false",
            "each process checks the model that it has loaded",
        ),
        (
            not plugin.activation_checkpointing,
            "fsdp_activation_checkpointing: false",
            "the training file's `gradient_checkpointing: true` does that, in the adversary's steps too",
        ),
        (
            not isinstance(plugin.cpu_offload, CPUOffloadPolicy),
            "fsdp_offload_params: false",
            "weights in the host's memory are not supported",
        ),
    ]
    if problems := [f"  {key}  ({why})" for fine, key, why in wanted if not fine]:
        raise UsageError("training in shards needs these settings of accelerate:\n" + "\n".join(problems))


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def prepared(accelerator: Accelerator, module: nn.Module, vlm: HuggingFaceVLM) -> nn.Module:
    """`module`, which computes a loss with `vlm`, for the processes there are: wrapped, or its model in shards."""
    if accelerator.distributed_type != DistributedType.FSDP:
        wrapped: nn.Module = accelerator.prepare(module)
        return wrapped
    if not is_sharded(vlm.model):
        _shard(accelerator, vlm)
    computes: Any = module
    # As accelerate does with what it wraps: the loss is then computed as rollouts and reference are.
    computes.forward = accelerator.autocast()(module.forward)
    return module


def _shard(accelerator: Accelerator, vlm: HuggingFaceVLM) -> None:
    """In place: the model stays the same object, its parameters become DTensors."""
    vlm.prefix = Prefix.off("the weights are in shards")  # it would hold on to the whole ones
    plugin, model = accelerator.state.fsdp_plugin, vlm.model
    # Weights are gathered, and gradients added up, in float32: bfloat16 is autocast's, as without shards. FSDP's own
    # policy would keep the residual stream in bfloat16 too.
    plugin.mixed_precision_policy = None
    # accelerate takes a model only with an optimiser; the stages' own come later, on the shards.
    sharded: Any = accelerator.prepare(model, torch.optim.SGD(model.parameters()))[0]
    sharded.set_reshard_after_forward(True)  # the outermost weights as well, which are kept whole by default
    # transformers' `generate` encodes the image before it calls the model's forward, and PEFT's goes past its own: the
    # outermost weights are gathered for all of it. By transformers' own mark it then ends on all processes at once.
    register_fsdp_forward_method(sharded, "generate")
    base: Any = unwrapped(model)
    base._is_fsdp_managed_module = True
    # The first pass settles the gradients' type for good, by what is trained: it must not be an attack's, where all is
    # frozen.
    batch = probe_batch(vlm)
    with torch.no_grad():
        vlm.option_logits(batch, batch.pixels)


def any_process(model: nn.Module, own: bool) -> bool:
    """Whether any process says so, where the model is in shards; else `own`. To be asked by all, or by none."""
    if not is_sharded(model):
        return own
    flag = torch.tensor(float(own), device=next(model.parameters()).device)
    torch.distributed.all_reduce(flag)
    return bool(flag > 0)


def whole(tree: Any, keep: bool = True) -> Any:
    """A state with every sharded tensor gathered, on the CPU; all else as it is. Called by all processes alike.

    keep: False for those that have no use for it; they get None in the places of tensors.
    """
    if isinstance(tree, DTensor):
        gathered = tree.full_tensor().detach()
        return gathered.cpu() if keep else None
    if isinstance(tree, dict):
        return {name: whole(value, keep) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(whole(value, keep) for value in tree)
    return tree


def spread(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as this process holds `like`: its device, or its part."""
    if not isinstance(like, DTensor):
        return value.to(like.device)
    on = value.to(like.device_mesh.device_type)
    return distribute_tensor(on, like.device_mesh, like.placements, src_data_rank=None)


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Restore an optimiser from a whole `state_dict`."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        number: {
            name: spread(value, parameters[number]) if value.shape == parameters[number].shape else value
            for name, value in held.items()
        }
        for number, held in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": moments})
