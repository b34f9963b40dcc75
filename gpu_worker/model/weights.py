"""Weights of a model, or a rank's share of them, read from a folder or made at random."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from clo.gpu_worker.model.parameters import read_parameters, rope, shapes
from clo.runtime.config import ResolvedModel
from clo.runtime.model.kv_shape import KVShape
from clo.runtime.model.ranks import ALONE, Rank
from clo.runtime.wire.errors import ConfigError

_DUMMY_DEVIATION = 0.02

Cut = Callable[[Tensor], Tensor]  # a parameter -> the part of it that a rank has
Place = Callable[[str, Tensor, Cut], Tensor]  # name, parameter and cut -> the tensor that the decoder keeps


@dataclass(frozen=True)
class Linear:
    """``x @ weight.T + bias``; weight [out, in], bias [out] or None."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor, into: Tensor | None = None) -> Tensor:
        """[N, out] of [N, in]; ``into`` becomes it where that is given."""
        if into is None:
            return F.linear(x, self.weight, self.bias)
        if self.bias is None:
            return torch.mm(x, self.weight.T, out=into)
        return torch.addmm(self.bias, x, self.weight.T, out=into)

    def first(self, rows: int) -> "Linear":
        """The part that computes the first ``rows`` outputs, without a copy."""
        return Linear(self.weight[:rows], None if self.bias is None else self.bias[:rows])


@dataclass(frozen=True)
class Layer:
    """Weights of one layer. ``qkv`` yields all query heads, then key and value of each KV head in turn.

    A rank has only its heads, and its part of the intermediate size; its ``output`` and ``down`` yield its
    share of a sum. The biases of these two are with the first rank."""

    attention_norm: Tensor  # [hidden]
    qkv: Linear  # [(query_heads + 2 * kv_heads) * head_dim, hidden]
    qk_norm: Tensor | None  # [query_heads + 2 * kv_heads, head_dim], of which the values' rows are not used
    output: Linear  # [hidden, query_heads * head_dim]
    mlp_norm: Tensor  # [hidden]
    gate_up: Linear  # [2 * intermediate, hidden]
    down: Linear  # [hidden, intermediate]


@dataclass(frozen=True)
class Weights:
    """All weights of a model, on one device. ``head`` is ``embedding`` itself where the model ties them.

    A rank has its part of the vocabulary in both, filled up with zeros where that is smaller than the first
    one's."""

    embedding: Tensor  # [vocab, hidden]
    layers: tuple[Layer, ...]
    norm: Tensor  # [hidden]
    head: Tensor  # [vocab, hidden]
    rope_frequencies: Tensor  # [head_dim / 2], float32
    rope_scale: float  # factor of cosines and sines; 1 unless the RoPE scaling asks for another


def load_weights(model: ResolvedModel, shape: KVShape, rank: Rank = ALONE) -> Weights:
    """Load the weights, or make random ones (``load_format`` "dummy").

    A rank reads no more than its share. Of random ones it makes each as a whole and keeps a part, so that
    they do not depend on the ranks.

    Args:
        shape: of the whole model.
        rank: whose weights they are.

    Raises:
        ConfigError: weights are missing, too many, damaged, of the wrong shape or not finite.
    """
    config = model.architecture
    device, sizes = torch.device(model.device), shapes(config, shape)
    if model.load_format == "dummy":
        parameters = {
            name: torch.empty(size, dtype=shape.dtype, device="meta") for name, size in sizes.items()
        }
        place: Place = partial(_random, torch.Generator(device).manual_seed(model.seed))
    else:
        parameters, place = read_parameters(model, sizes), partial(_checked, model)
    frequencies, scale = rope(config, shape)
    with tqdm(  # disable=None: shown only where stderr is a terminal
        total=sum(parameter.nbytes for parameter in parameters.values()),
        desc="Loading weights", unit="B", unit_scale=True, unit_divisor=1024, disable=None,
    ) as bar:  # fmt: skip
        tensors = _Tensors(parameters, place, bar.update, shape, rank)
        embedding = tensors.vocabulary("model.embed_tokens.weight")
        return Weights(
            embedding=embedding,
            layers=tuple(tensors.layer(f"model.layers.{index}.") for index in range(shape.layers)),
            norm=tensors.take("model.norm.weight"),
            head=tensors.vocabulary("lm_head.weight") if "lm_head.weight" in tensors else embedding,
            rope_frequencies=frequencies.to(device),
            rope_scale=scale,
        )


def _checked(model: ResolvedModel, name: str, parameter: Tensor, cut: Cut) -> Tensor:
    part = cut(parameter)
    # a copy, as the parameter itself is a mapped file, which may change
    dtype: torch.dtype = getattr(torch, model.dtype)
    tensor = part.to(model.device, dtype, copy=True, memory_format=torch.contiguous_format)
    if not tensor.isfinite().all():
        raise ConfigError(
            f"The weights in {model.folder} are damaged: {name} holds values that are not finite in "
            f"{model.dtype}; copy the model again, or choose another --dtype."
        )
    return tensor


def _random(generator: torch.Generator, name: str, parameter: Tensor, cut: Cut) -> Tensor:
    """Norms are 1, others are drawn from a normal distribution, in the final dtype on the final device."""
    tensor = torch.empty_like(parameter, device=generator.device)
    if name.endswith("norm.weight"):
        return tensor.fill_(1.0)
    part = cut(tensor.normal_(0.0, _DUMMY_DEVIATION, generator=generator))
    return part if part.numel() == tensor.numel() else part.clone(memory_format=torch.contiguous_format)


def _whole(parameter: Tensor) -> Tensor:
    return parameter


class _Tensors:
    """The parameters of a model, each handed out once, so that memory holds no weight twice.

    Args:
        parameters: by name, from which each one is taken out.
        place: turns a parameter into the tensor to keep.
        placed: is told the bytes of each.
        shape: of the whole model.
        rank: whose parts are taken.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        place: Place,
        placed: Callable[[int], object],
        shape: KVShape,
        rank: Rank,
    ) -> None:
        self._parameters, self._place, self._placed = parameters, place, placed
        self._shape, self._rank = shape, rank

    def __contains__(self, name: str) -> bool:
        return name in self._parameters

    def take(self, name: str, cut: Cut = _whole) -> Tensor:
        parameter = self._parameters.pop(name).detach()
        tensor = self._place(name, parameter, cut)
        self._placed(parameter.nbytes)
        return tensor

    def vocabulary(self, name: str) -> Tensor:
        """The rank's part of a matrix with a row for each token."""
        whole = len(self._parameters[name])
        most, part = -(-whole // self._rank.count), self._rank.part(whole)
        tensor = self.take(name, partial(_rows, part))
        return F.pad(tensor, (0, 0, 0, most - len(tensor))) if len(tensor) < most else tensor

    def by_outputs(self, parts: dict[str, slice]) -> Linear:
        """One projection whose outputs are the given parts of all, in order."""
        weights, biases = [], []
        for name, part in parts.items():
            weights.append(self.take(f"{name}.weight", partial(_rows, part)))
            if f"{name}.bias" in self:
                biases.append(self.take(f"{name}.bias", partial(_rows, part)))
        return Linear(_join(weights), _join(biases) if biases else None)

    def by_inputs(self, name: str, part: slice) -> Linear:
        """A projection of a part of its inputs: a share of the sum that its outputs are."""
        weight = self.take(f"{name}.weight", lambda parameter: parameter[:, part])
        bias = self.take(f"{name}.bias") if f"{name}.bias" in self else None
        return Linear(weight, bias if self._rank.number == 0 else None)

    def layer(self, prefix: str) -> Layer:
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        own, dim = self._rank.shape(self._shape), self._shape.head_dim
        query_heads, kv_heads = own.query_heads, own.kv_heads
        queries = _of_heads(self._rank.part(self._shape.query_heads), dim)
        pairs = _of_heads(self._rank.kv_heads(self._shape.kv_heads), dim)
        inner = self._rank.part(len(self._parameters[f"{mlp}up_proj.weight"]))
        qk_norm = None
        if f"{attention}q_norm.weight" in self:
            query = self.take(f"{attention}q_norm.weight").expand(query_heads, -1)
            key = self.take(f"{attention}k_norm.weight").expand(2 * kv_heads, -1)
            qk_norm = torch.cat((query, key))
        return Layer(
            attention_norm=self.take(f"{prefix}input_layernorm.weight"),
            qkv=_in_turn(
                self.by_outputs(
                    {f"{attention}q_proj": queries, f"{attention}k_proj": pairs, f"{attention}v_proj": pairs}
                ),
                query_heads,
                kv_heads,
            ),
            qk_norm=qk_norm,
            output=self.by_inputs(f"{attention}o_proj", queries),
            mlp_norm=self.take(f"{prefix}post_attention_layernorm.weight"),
            gate_up=self.by_outputs({f"{mlp}gate_proj": inner, f"{mlp}up_proj": inner}),
            down=self.by_inputs(f"{mlp}down_proj", inner),
        )


def _rows(part: slice, parameter: Tensor) -> Tensor:
    return parameter[part]


def _of_heads(heads: slice, head_dim: int) -> slice:
    """The outputs of some heads."""
    return slice(heads.start * head_dim, heads.stop * head_dim)


def _in_turn(qkv: Linear, query_heads: int, kv_heads: int) -> Linear:
    """From all queries, all keys, all values to all queries, then each head's key and value in turn."""
    order = torch.arange(query_heads + 2 * kv_heads)
    order[query_heads:] = order[query_heads:].view(2, kv_heads).t().flatten()

    def sorted_heads(tensor: Tensor) -> Tensor:
        return tensor.view(len(order), -1, *tensor.shape[1:])[order.to(tensor.device)].flatten(0, 1)

    return Linear(sorted_heads(qkv.weight), None if qkv.bias is None else sorted_heads(qkv.bias))


def _join(tensors: list[Tensor]) -> Tensor:
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]
