"""Which layers of a model have a quantized form, and why the others have none."""

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from . import nn as qnn

# In names of parameters that inputs are multiplied by; and of tables and factors, which are no matrices.
_MATRICES = ("weight", "kernel", "proj")
_TABLES = ("pos", "embed", "token", "bias", "prompt", "scale", "gamma")
_NO_LAYERS = (nn.LayerNorm, nn.RMSNorm, ParametrizationList)


def quantizable(model, exclude=()):
    """(name, module) of the layers that quantize_ swaps, in the order of the model; a shared one under each name."""
    outside, modules = _excluded(model, exclude), model.named_modules(remove_duplicate=False)
    return [(name, m) for name, m in modules if _has_form(m) and m not in outside]


def _has_form(module):
    return (type(module) in qnn.QUANTIZED or bare(module)) and not _hooked(module)


def _hooked(module):
    """Whether a function of its own stands in place of forward, as accelerate's offloading puts there."""
    return "forward" in vars(module)


def bare(module):
    """Whether it is one of qk.nn's layers that was made by hand and has no quantizer yet."""
    return (
        type(module) in qnn.QUANTIZED.values() and module.weight_quantizer is module.input_quantizer is None
    )


def _excluded(model, exclude):
    """The modules that one of their names puts into ``exclude``."""
    modules = model.named_modules(remove_duplicate=False)
    return {m for name, m in modules if any(within(name, e) for e in exclude)}


def within(name, other):
    """Whether ``name`` is the module of the name ``other``, or below it."""
    return name == other or name.startswith(other + ".")


def left_in_float(model):
    """(name, module, why) of the layers with a matrix of weights that no quantizer sees, in the model's order."""
    told = {part for m in model.modules() if isinstance(m, qnn._Quantized) for part in m.modules()}
    return [
        (name, m, _why_float(m))
        for name, m in model.named_modules()
        if m not in told and not isinstance(m, _NO_LAYERS) and _has_weight_matrix(m)
    ]


def _has_weight_matrix(module):
    return is_parametrized(module, "weight") or any(
        nn.parameter.is_lazy(p) or _is_matrix(name, p) for name, p in module.named_parameters(recurse=False)
    )


def _is_matrix(name, p):
    """By its name, or a stack of matrices, as experts have; tables of positions and tokens are none."""
    if p.dim() > 1 and any(word in name for word in _MATRICES):
        return True
    return sum(n > 1 for n in p.shape) > 2 and not any(word in name for word in _TABLES)


def _why_float(module):
    if is_parametrized(module):
        return "parametrized; torch.nn.utils.parametrize.remove_parametrizations makes it a plain layer"
    if _hooked(module):
        return "its forward was replaced; quantize_ first"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "lazy; one forward pass makes it a plain layer"
    base = next((kind for kind in qnn.QUANTIZED if isinstance(module, kind)), None)
    return (
        "no quantized form" if base is None else f"a subclass of {base.__name__} may compute something else"
    )


def describe_left(model, exclude):
    """left_in_float in one line, by reason, without the excluded."""
    groups, outside = {}, _excluded(model, exclude)
    for name, m, why in left_in_float(model):
        if m not in outside:
            groups.setdefault(f"({type(m).__name__}: {why})", []).append(name or "(model)")
    return ", ".join(f"{_short(names)} {what}" for what, names in groups.items())


def _short(names):
    return " ".join(names) if len(names) <= 8 else f"{' '.join(names[:4])} and {len(names) - 4} more"
