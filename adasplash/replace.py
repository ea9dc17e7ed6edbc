"""α-entmax in models that call ``torch.nn.functional.scaled_dot_product_attention``: while a context lasts, or in the
modules of one model for good.

Both are a ``TorchFunctionMode``: torch asks it before any of its functions runs, under whatever name a program knows
that function, and its compiler and exporter trace through it.
"""

import copyreg
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from adasplash._arguments import NUMBER_OR_TENSOR, check, refuse
from adasplash.masked import LEAST_ALPHA
from adasplash.multihead import EntmaxMultiheadAttention
from adasplash.sdpa import scaled_dot_product_attention

_SDPA = "scaled_dot_product_attention"
#: Attention that is no function of torch's, or none that can be replaced, by the beginning of its name.
_OTHERS = ("flash_attn", "flex_attention", "memory_efficient_attention", "multi_head_attention_forward", "sageattn")
#: Looked up once, as a mode is asked for each function.
_REPLACED = (
    nn.functional.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)
_SOFTMAX = (
    Tensor.softmax,
    torch.softmax,
    torch.special.softmax,
    nn.functional.softmax,
    torch.ops.aten.softmax.int,
    torch.ops.aten._softmax.default,
)


class replace_sdpa(TorchFunctionMode):
    """In this context ``scaled_dot_product_attention`` is α-entmax attention, wherever it is called::

        with adasplash.replace_sdpa(alpha=1.5):
            out = model(x)

    It is for this thread, works inside and outside of compiled code, and takes the function by whatever name, as it was
    imported before and as ``torch.ops.aten.scaled_dot_product_attention`` too. What computes attention without it would
    go on with softmax: a softmax over the last of four or more dimensions is an error here. So is
    ``nn.MultiheadAttention``, which does not show what it calls; :func:`adasplash.patch_sdpa` takes it.

    So is code that checkpointing computes again in the backward, as torch asks no mode there.

    Args:
        alpha: a number, 1 or from 1.01 to 2, or a tensor of shape () or (H,) as in :func:`adasplash.entmax_attn`.
    """

    def __init__(self, alpha: float | Tensor = 1.5, _who: str = "replace_sdpa"):
        super().__init__()
        if not torch.compiler.is_compiling():
            _check_alpha("replace_sdpa", alpha)
        self.alpha, self.who = alpha, _who
        self._entered: list[FrameType] = []

    def __enter__(self) -> "replace_sdpa":
        if not torch.compiler.is_compiling():
            self._entered.append(sys._getframe(1))
        return super().__enter__()

    def __exit__(self, *error) -> None:
        # Nothing is noted where compiled code entered, up to a graph break.
        if not torch.compiler.is_compiling() and self._entered:
            self._entered.pop()
        super().__exit__(*error)

    def _refuse_checkpoints(self) -> None:
        """Raises if a checkpoint is on the way here from where the context was entered: it would be left by then."""
        frame, entered = sys._getframe(2), self._entered[-1] if self._entered else None
        while frame is not None and frame is not entered:
            if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
                raise NotImplementedError(
                    f"{self.who}: checkpointing would compute softmax in the backward, where this context is left; "
                    "enter adasplash.replace_sdpa in what is checkpointed, as modules do for themselves that "
                    f"adasplash.patch_sdpa(model) knows by their code, which names {_SDPA}"
                )
            frame = frame.f_back

    def _holding(self, function: Callable) -> Callable:
        def held(*args, **kwargs):
            with replace_sdpa(self.alpha, self.who):
                return function(*args, **kwargs)

        return held

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _REPLACED:
            if not torch.compiler.is_compiling():
                self._refuse_checkpoints()
            return scaled_dot_product_attention(*args, **kwargs, alpha=self.alpha)
        if func is nn.functional.multi_head_attention_forward:
            raise NotImplementedError(
                f"{self.who}: nn.MultiheadAttention does not let its attention be replaced from outside; "
                "adasplash.patch_sdpa(model) makes it an EntmaxMultiheadAttention"
            )
        if func in _SOFTMAX:
            scores = args[0] if args else kwargs.get("input")
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            if isinstance(scores, Tensor) and scores.dim() >= 4 and dim in (-1, scores.dim() - 1):
                raise NotImplementedError(
                    f"{self.who}: a softmax over the last dimension of sizes {list(scores.shape)} is attention that "
                    "does not call scaled_dot_product_attention; switch the model to that function (in timm by "
                    "fused_attn=True)"
                )
        if func is checkpoint:  # in compiled code only, which would trace its function without this mode
            return func(self._holding(args[0]), *args[1:], **kwargs)
        if func is Tensor.unflatten:  # written in Python, with a super() that torch's compiler does not know
            return args[0].unflatten(*args[1:], **kwargs)
        return func(*args, **kwargs)


def patch_sdpa(model: nn.Module, alpha: float | Tensor = 1.5) -> nn.Module:
    """Gives α-entmax attention to one model that calls ``scaled_dot_product_attention``, for good::

        model = adasplash.patch_sdpa(timm.create_model("vit_small_patch16_224"), alpha=1.5)

    The model's forward replaces every call that is reached in it, as :class:`adasplash.replace_sdpa` does. Modules
    whose code names the function, which is read from their classes and from the functions that these name, replace it
    for themselves too: so they may be called alone, and run again by checkpointing. ``nn.MultiheadAttention`` becomes
    :class:`adasplash.EntmaxMultiheadAttention`.

    Parameters, buffers, state_dict, hooks and names stay; copies, pickles, compiled and exported models have it too.
    Once more with another alpha it changes that. :func:`adasplash.unpatch_sdpa` undoes it.

    Args:
        model: any model; it is changed in place.
        alpha: a number, 1 (softmax) or from 1.01 to 2; or a tensor of shape () or (H,), shared by all modules, on
            their device. It is a buffer ``entmax_alpha`` that is not saved; changed in place it needs no new
            compilation. It keeps its type where the model changes that; where the model goes to another device, each
            module has a copy there. With ``nn.MultiheadAttention`` in the model only a number.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is no module.
        ValueError: a module would go on with softmax, as it computes that itself or asks FlashAttention,
            FlexAttention or the like, or has a forward that is not its class's; a part of the model is TorchScript;
            the model itself is a graph of ``torch.fx`` or ``torch.export``; or nothing in it names the function. The
            message names the module. Nothing is changed then.
        NotImplementedError: in a forward, where a patched module computes softmax after all, or checkpointing would, of
            a module that does not name the function.
    """
    _check_model("patch_sdpa", model)
    _check_alpha("patch_sdpa", alpha)
    found = {module: name for name, module in model.named_modules() if _is_to_be_patched(name, module, alpha)}
    if not found:
        raise ValueError(
            f"patch_sdpa: no module of {type(model).__name__} names {_SDPA}; adasplash.replace_sdpa takes it by "
            "whatever name it is called"
        )
    compiled = getattr(model, "_orig_mod", None)  # of what torch.compile returns, which has no class of its own
    root = compiled if isinstance(compiled, nn.Module) else model
    for module, name in ({root: ""} | found).items():
        _check_forward(name, module, is_root=module is root)
    for module in {root: ""} | found:
        if isinstance(module, nn.MultiheadAttention):
            module.__class__ = EntmaxMultiheadAttention
            module._qkv_same_embed_dim = False
            module.alpha, module._was_patched = float(alpha), True
            continue
        if isinstance(module, (GraphModule, EntmaxMultiheadAttention)):
            continue
        if not isinstance(module, _Patched):
            module.__class__ = _patched(type(module))
        _forget_alpha(module)
        if isinstance(alpha, Tensor):
            module.register_buffer("entmax_alpha", alpha, persistent=False)
        else:
            module.entmax_alpha = float(alpha)
    return model


def unpatch_sdpa(model: nn.Module) -> nn.Module:
    """Gives the modules of `model` back what :func:`adasplash.patch_sdpa` took.

    Raises:
        TypeError: `model` is no module.
        ValueError: a module has got another class or another forward since, as by ``fully_shard``, parametrizations or
            accelerate's hooks, which would be lost. Nothing is changed then.
    """
    _check_model("unpatch_sdpa", model)
    for name, module in model.named_modules():
        if isinstance(module, _Patched) and ("_unpatched" not in vars(type(module)) or "forward" in vars(module)):
            raise ValueError(
                f"unpatch_sdpa: {name or 'the model'} ({type(module).__name__}) has got another class or forward since "
                "it was patched; undo that first"
            )
    for module in model.modules():
        if isinstance(module, _Patched):
            module.__class__ = type(module)._unpatched
            _forget_alpha(module)
        elif isinstance(module, EntmaxMultiheadAttention) and getattr(module, "_was_patched", False):
            module.__class__ = nn.MultiheadAttention
            module._qkv_same_embed_dim = module.in_proj_weight is not None
            del module.alpha, module._was_patched
    return model


def _forget_alpha(module: nn.Module) -> None:
    if hasattr(module, "entmax_alpha"):
        del module.entmax_alpha


def _check_model(function: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        refuse(function, "model", "a module", model)


def _check_alpha(function: str, alpha: float | Tensor) -> None:
    check(function, "alpha", NUMBER_OR_TENSOR, alpha)
    if not isinstance(alpha, Tensor) and alpha != 1 and not LEAST_ALPHA <= alpha <= 2:
        raise ValueError(f"{function}: alpha must be 1 or from {LEAST_ALPHA} to 2, got {alpha}")


def _refuse(name: str, module: nn.Module, what: str) -> None:
    raise ValueError(f"patch_sdpa: {name or 'the model'} ({type(module).__name__}) {what}")


def _check_forward(name: str, module: nn.Module, is_root: bool) -> None:
    """Raises where a class that is made of the module's would not be asked for its forward."""
    if isinstance(module, GraphModule):
        if is_root:  # these write their class anew when they are compiled and copied
            _refuse(name, module, "is a graph; patch the model that it was made of, or enter adasplash.replace_sdpa")
    elif not isinstance(module, _Patched) and (
        "forward" in vars(module) or not isinstance(inspect.getattr_static(type(module), "forward"), FunctionType)
    ):
        _refuse(name, module, "has a forward that is not its class's, as accelerate's hooks give it; patch it before")


def _is_to_be_patched(name: str, module: nn.Module, alpha: float | Tensor) -> bool:
    """Raises where the module would go on with softmax."""
    refuse = functools.partial(_refuse, name, module)
    if isinstance(module, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        refuse("is TorchScript, and cannot be changed any more; patch the module that it was made of")
    if isinstance(module, _Patched):
        return True
    if isinstance(module, EntmaxMultiheadAttention):
        return getattr(module, "_was_patched", False)
    if type(module) is nn.MultiheadAttention:
        if module.bias_k is not None or module.add_zero_attn:
            refuse("has add_bias_kv or add_zero_attn, which EntmaxMultiheadAttention has not")
        if isinstance(alpha, Tensor):
            refuse("takes a number as alpha")
        return True
    if isinstance(module, GraphModule):
        return any(_SDPA in str(node.target) for node in module.graph.nodes)
    # Parametrizations and fully_shard make classes in torch, which derive from the module's.
    written = any(not each.__module__.startswith(("torch.", "adasplash.")) for each in type(module).__mro__[:-1])
    if not written and not isinstance(module, nn.MultiheadAttention):
        return False
    mentioned = {each for names in _mentions(type(module)).values() for each in names}
    if _SDPA in mentioned:
        if getattr(module, "fused_attn", True) is False:
            refuse(f"does not call {_SDPA} while its fused_attn is False; set it to True")
        return True
    if isinstance(module, nn.MultiheadAttention):
        refuse("derives from nn.MultiheadAttention, which lets nothing be replaced in it from outside")
    if "ALL_ATTENTION_FUNCTIONS" in mentioned:
        refuse("is a layer of transformers; adasplash.integrations.transformers.configure(model) is for these")
    for other in _OTHERS:
        if any(each.startswith(other) for each in mentioned):
            refuse(f"asks {other}, which cannot be replaced; switch the model to {_SDPA}")
    kind = type(module).__name__.lower()
    computes = any(each in mentioned for each in ("softmax", "Softmax")) or any(
        isinstance(child, nn.Softmax) for child in module.children()
    )
    if computes and ("attention" in kind or "attn" in kind):
        refuse(f"computes softmax itself; write it with {_SDPA}, or with adasplash.entmax")
    return False


class _Patched:
    """What patched modules derive from."""

    _unpatched: type[nn.Module]

    def __reduce_ex__(self, protocol):
        """As an instance of a class that is made again from the one that it was."""
        made_by, arguments, *rest = super().__reduce_ex__(protocol)
        if made_by is copyreg.__newobj__ and arguments[0] is type(self):
            made_by, arguments = _new, (self._unpatched, *arguments[1:])
        return (made_by, arguments, *rest)

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        """α keeps its type, which bfloat16 would round, and stays the tensor that others hold while it can."""
        alpha = self._buffers.pop("entmax_alpha", None)
        super()._apply(fn, recurse)
        if alpha is not None:
            self._buffers["entmax_alpha"] = alpha.to(fn(alpha).device)
        return self


def _new(kind: type[nn.Module], *arguments: Any) -> nn.Module:
    made = _patched(kind)
    return made.__new__(made, *arguments)


@functools.cache
def _patched(kind: type[nn.Module]) -> type[nn.Module]:
    """`kind` with the function replaced in its forward, and in its other methods from which it is reached."""
    names = {name for name, mentioned in _mentions(kind).items() if _SDPA in mentioned} - {"__init__"} | {"forward"}
    methods = {name: inspect.getattr_static(kind, name) for name in names}
    body: dict[str, Any] = {name: _replacing(each) for name, each in methods.items() if isinstance(each, FunctionType)}
    body |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (_Patched, kind), body | {"_unpatched": kind})


def _replacing(method: Callable) -> Callable:
    @functools.wraps(method)
    def replaced(self, *args, **kwargs):
        if not hasattr(self, "entmax_alpha"):  # made anew of the class, as a slice of nn.Sequential is
            return method(self, *args, **kwargs)
        with replace_sdpa(self.entmax_alpha, type(self).__name__):
            return method(self, *args, **kwargs)

    return replaced


@functools.cache
def _mentions(kind: type) -> dict[str, frozenset[str]]:
    """Which names the methods of a class mention, and the Python functions that they name."""
    methods: dict[str, frozenset[str]] = {}
    for each in kind.__mro__:
        if each is object or each.__module__.startswith("torch."):
            continue
        for name, function in vars(each).items():
            if not isinstance(function, (FunctionType, staticmethod, classmethod)):
                continue
            above = methods.get(name, frozenset())
            if name not in methods or not above.isdisjoint({"super", each.__name__}):  # it goes on to this one
                methods[name] = above | frozenset(_reached_from(function))
    return methods


def _reached_from(function: Callable) -> Iterator[str]:
    waiting, seen = [function], set()
    while waiting:
        reached = inspect.unwrap(waiting.pop())
        if not isinstance(reached, FunctionType) or reached.__code__ in seen:
            continue
        seen.add(reached.__code__)
        names = {name for code in _codes(reached.__code__) for name in code.co_names}
        values = {name: reached.__globals__[name] for name in names if name in reached.__globals__}
        for module in [value for value in values.values() if isinstance(value, ModuleType)]:
            values |= {name: vars(module)[name] for name in names if name in vars(module)}
        yield from names
        for value in values.values():
            name = getattr(value, "__name__", None)
            if isinstance(name, str):
                yield name  # which an import may have changed
            if isinstance(value, FunctionType) and not str(value.__module__).startswith("torch."):
                waiting.append(value)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
