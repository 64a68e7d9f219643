"""What a computation would allocate: it runs on the meta device, without storage, and is counted.

Numbers with a fraction have no values there. Integers (token ids, masks, positions, sizes of
pictures) are few and decide what happens next: they are calculated for real, on the CPU.
"""
import weakref
from contextlib import contextmanager
from functools import partial
from unittest import mock

import torch
from bitsandbytes.nn import Linear4bit
from torch.nn import functional
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from lib import head

aten = torch.ops.aten
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default,
            aten._unsafe_index.Tensor, aten._unsafe_index_put.default,
            aten._index_put_impl_.default)


class LiveBytes(TorchDispatchMode):
    """While it is entered, counts the bytes of tensors that were made inside it and still live.

    Args: weights: tensors that lie there and are not counted, nor are views of them.
    Attributes: peaks, {moment: bytes}: what lived when a moment was largest.
    """

    def __init__(self, weights):
        super().__init__()
        self.storages = {w.untyped_storage()._cdata: None for w in weights}  # None: not counted
        self.known = {}  # operation and shapes -> forms of the new tensors that it makes
        self.moment = "before"
        self.start()

    def start(self):
        """Count anew: what lives now (gradients) lies there from now on."""
        self.living = 0
        self.peaks = {}
        self.round = object()  # what was made before does not count when it dies

    @contextmanager
    def during(self, moment):
        """Names what happens inside, which may be a part of another moment."""
        whole = self.moment
        self.moment = moment
        try:
            yield
        finally:
            self.moment = whole

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(t.is_meta for t in _tensors([*args, *kwargs.values()])):
            result = self._without_values(function, args, kwargs)
        else:
            result = self._with_values(function, args, kwargs)
        for tensor in _tensors([result]):
            if tensor.is_meta or not tensor.is_floating_point():  # others are in host memory
                self._count(tensor.untyped_storage())
        return result

    def _without_values(self, function, args, kwargs):
        if function is aten._local_scalar_dense.default:
            return 0.0
        if function is aten._to_copy.default and kwargs.get("device") == torch.device("cpu"):
            return torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if function in INDEXING:
            args = (args[0], _places(args[1]), *args[2:])
        if not all(t.is_meta for t in _tensors([*args, *kwargs.values()])):
            args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to("meta"), (args, kwargs))
        result = self._on_meta(function, args, kwargs)
        if isinstance(result, torch.Tensor) and not result.is_floating_point():
            return torch.zeros(result.shape, dtype=result.dtype)
        return result

    def _on_meta(self, function, args, kwargs):
        """The meta device is slow and layers are alike: forms of new tensors are remembered."""
        key = (function, _form(args), _form(tuple(kwargs.items())))
        if key in self.known:
            made = [torch.empty_strided(shape, stride, dtype=dtype, device="meta")
                    for shape, stride, dtype in self.known[key]]
            return made if len(made) > 1 else made[0]
        result = function(*args, **kwargs)
        made = result if isinstance(result, (tuple, list)) else [result]
        given = {t.untyped_storage()._cdata for t in _tensors([*args, *kwargs.values()])}
        if all(isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in given
               for t in made):
            self.known[key] = [_form(t) for t in made]
        return result

    def _with_values(self, function, args, kwargs):
        result = function(*args, **kwargs)
        if not isinstance(result, torch.Tensor):
            return result
        if result.is_floating_point():
            return result.to("meta")
        return function(*args, **{**kwargs, "device": "cpu"}) if result.is_meta else result

    def _count(self, storage):
        key, size, made_in = storage._cdata, storage.nbytes(), self.round
        if key in self.storages:
            return

        def forget(_):
            self.storages.pop(key, None)
            if made_in is self.round:
                self.living -= size

        self.storages[key] = weakref.ref(storage, forget)
        self.living += size
        self.peaks[self.moment] = max(self.peaks.get(self.moment, 0), self.living)


def _places(indices):
    """Indices without masks: how many elements these choose depends on their values."""
    places = []
    for index in indices:
        is_mask = index is not None and index.dtype == torch.bool
        places += index.nonzero(as_tuple=True) if is_mask else [index]
    return places


def _form(value):
    """Of an argument of an operation, what the forms of its results depend on."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    return tuple(_form(item) for item in value) if isinstance(value, (tuple, list)) else value


def _tensors(values):
    """The tensors among the values, and in lists among them."""
    for value in values:
        for item in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(item, torch.Tensor):
                yield item


# ---------------------------------------------------------------- what the meta device lacks
@contextmanager
def meta_kernels():
    """Inside, attention is fused as on a CPU or GPU, where meta tensors would make whole matrices,
    autocast, which they do not have, casts the weights of linear layers, and an output layer in 4
    bits is dequantised."""
    with (mock.patch.object(head, "dense", _dense_head),
          mock.patch.object(functional, "scaled_dot_product_attention", _attention),
          mock.patch.object(functional, "linear", _autocast_linear),
          mock.patch.object(torch, "autocast", _Autocast)):
        yield


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
               enable_gqa=False):
    if attn_mask is not None and not attn_mask.is_floating_point():
        attn_mask = torch.empty(attn_mask.shape, dtype=query.dtype, device=query.device)
    return aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _dense_head(layer):
    in_4bit = isinstance(layer, Linear4bit)
    return torch.empty_like(layer.weight) if in_4bit else layer.weight.data


class _Autocast:
    """Remembers the casts of weights until it is left, as torch's own."""
    casts = None

    def __init__(self, device_type, dtype=None, enabled=True):
        self.enabled = enabled

    def __enter__(self):
        self.outside = _Autocast.casts
        _Autocast.casts = {} if self.enabled else None

    def __exit__(self, *error):
        _Autocast.casts = self.outside


def _autocast_linear(x, weight, bias=None):
    if weight.dtype != x.dtype:
        casts = {} if _Autocast.casts is None else _Autocast.casts
        if id(weight) not in casts:
            casts[id(weight)] = weight.to(x.dtype)
        weight = casts[id(weight)]
    return linear(x, weight, bias)


class Matmul4bit(torch.autograd.Function):
    """As bitsandbytes': the dense weight lives during a matmul, forward and backward.

    So do its scales and the workspace of the kernel, on a CPU up to a byte per weight.
    """

    @staticmethod
    def forward(context, layer, x):
        context.weight = layer.weight
        dense, *_ = _dense(layer.weight)
        return linear(x, dense, layer.bias)

    @staticmethod
    def backward(context, gradient):
        dense, *_ = _dense(context.weight)
        return None, gradient @ dense


def _dense(weight):
    scales = torch.empty(weight.numel() // 64, device="meta")
    workspace = torch.empty(weight.numel() // 2, dtype=torch.bfloat16, device="meta")
    return torch.empty_like(weight), scales, workspace


def replace_4bit_matmuls(model):
    """4-bit layers compute as in Matmul4bit; on the meta device their weights stand there dense."""
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.forward = partial(Matmul4bit.apply, layer)
