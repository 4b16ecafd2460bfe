"""Refuse modules that `FlatModule` cannot turn into a pure, twice differentiable function."""

from __future__ import annotations

import copy
import inspect
from types import FunctionType

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mtt_fast.errors import InputError


def check_kind(module: nn.Module) -> None:
    """Raise `InputError` unless `module` can become a pure, twice differentiable function."""
    if not isinstance(module, nn.Module):
        raise InputError(f"FlatModule: expected a torch.nn.Module, found {type(module).__name__}")
    for name, part in module.named_modules():
        where = f"layer {name}" if name else "the module"
        if hasattr(part, "_orig_mod") or part._compiled_call_impl is not None:
            raise InputError(
                f"FlatModule: {where} is compiled, so it has no second derivative; wrap it before torch.compile"
            )
        if isinstance(part, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise InputError(f"FlatModule: {where} is {type(part).__name__}, one copy a device; wrap its .module")
        if isinstance(part, torch.jit.ScriptModule):
            raise InputError(f"FlatModule: {where} is compiled by torch.jit; wrap the module that it was made from")
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and (problem := _problem_of_embedding(part)):
            raise InputError(f"FlatModule: {where} is nn.{type(part).__name__}{problem}")
    if not any(value.is_floating_point() or value.is_complex() for value in module.parameters()):
        raise InputError(f"FlatModule: expected a module with parameters, found {type(module).__name__} without any")
    if complex_ones := [name for name, value in module.named_parameters() if value.is_complex()]:
        raise InputError(
            f"FlatModule: expected real parameters, found {complex_ones[0]} complex; keep it as real numbers, and take "
            "torch.view_as_complex of them in the forward pass"
        )
    if hooked := [name for name, value in module.named_parameters() if value._backward_hooks]:
        raise InputError(
            f"FlatModule: parameter {hooked[0]} has a hook on its gradient, which would not be called; remove it, and do in the forward "
            "pass what it does"
        )
    own = set(module.parameters())
    if learned := [name for name, value in module.named_buffers() if value.requires_grad and value not in own]:
        raise InputError(
            f"FlatModule: buffer {learned[0]} requires a gradient, but none flows to a buffer; detach it, or make it a parameter, or a "
            "part of the images"
        )
    if any(nn.parameter.is_lazy(value) for value in module.parameters()):
        raise InputError(
            "FlatModule: expected a module that knows its sizes, found a lazy layer before its first call; call the module once"
        )


def _problem_of_embedding(part: nn.Embedding | nn.EmbeddingBag) -> str | None:
    """Return why the second derivative of an embedding fails or is wrong in torch, and how to fix it; None if it is right."""
    if not part.weight.requires_grad:
        return None
    if isinstance(part, nn.EmbeddingBag):
        return ", which has no second derivative in torch; use nn.Embedding, and .mean(1), .sum(1) or .amax(1) of its result"
    if part.sparse:
        return "(sparse=True), whose gradient does not fit into a vector of all parameters; use sparse=False"
    if part.max_norm is not None:
        return (
            "(max_norm=…), which overwrites its weights in the forward pass; leave max_norm out, and scale the looked-up vectors, as "
            "torch.renorm does"
        )
    if part.scale_grad_by_freq:
        return "(scale_grad_by_freq=True), whose second derivative in torch leaves the scale out; use scale_grad_by_freq=False"
    return None


def check_no_dropout(module: nn.Module) -> None:
    """Raise `InputError` for a layer with active dropout."""
    for name, part in module.named_modules():
        if part.training and _dropout_probability(part) > 0:
            raise InputError(
                f"FlatModule: layer {name or type(part).__name__} draws random numbers in training mode, so the backward "
                "sweep would not repeat the forward one; set its probability to 0, or call .eval()"
            )


def _dropout_probability(part: nn.Module) -> float:
    """Return the probability with which a layer drops values in training mode."""
    share = part.p if isinstance(part, nn.modules.dropout._DropoutNd) else getattr(part, "dropout", 0)
    return share if isinstance(share, (int, float)) else 0


def check_functions(module: nn.Module) -> None:
    """Raise `InputError` if a layer keeps a function that holds layers or parameters of `module`, since a copy would still use these.

    For a module without trainable parameters: `unroll` finds those that require a gradient.
    """
    own = {id(each) for each in (*module.modules(), *module.parameters())}
    for name, part in module.named_modules():
        for function in (leaf for leaf in tree_leaves(vars(part)) if isinstance(leaf, FunctionType)):
            used = inspect.getclosurevars(function)
            held = [inspect.unwrap(function), *used.nonlocals.values(), *used.globals.values()]
            if any(id(getattr(value, "__self__", value)) in own for value in held):
                raise InputError(
                    f"FlatModule: layer {name or type(part).__name__} keeps a function, {function.__qualname__}, that holds parts of the "
                    "module, and a copy would use these; make it a method of the layer's class, or take torch.compile out"
                )


def copy_of(module: nn.Module) -> nn.Module:
    """Return a deep copy. Raises `InputError` for a module that cannot be copied."""
    try:
        return copy.deepcopy(module)
    except (RuntimeError, TypeError) as error:
        if computed := _computed_tensor(module):
            raise InputError(
                f"FlatModule: expected a module that computes {computed} in its forward pass, found one that keeps it, with its graph; "
                "wrap a module before ReparamModule does, after torch.nn.utils.prune call its remove, for weight_norm and spectral_norm "
                "take those of torch.nn.utils.parametrizations"
            ) from error
        reason = str(error).split(chr(10))[0]
        raise InputError(
            f"FlatModule: expected a module that copy.deepcopy copies, found {type(module).__name__}: {reason}; take out what cannot be "
            "copied"
        ) from error


def _computed_tensor(module: nn.Module) -> str | None:
    """Return the name of a tensor in `module` that was computed from others, and so cannot be copied; None if there is none."""
    for name, part in module.named_modules():
        for attribute, value in (vars(part) | part._buffers).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                return f"{name}.{attribute}".removeprefix(".")
    return None
