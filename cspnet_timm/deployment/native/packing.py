"""Weights as the products want them: panels of 32 output channels, step by step."""
import itertools
from typing import Any, Dict, Iterable, List, Tuple

import torch
import torch.nn.functional as F

from .graph import Layer, Value
from .records import FLOW, MODE

__all__ = ['flow', 'in_order', 'pack_depthwise', 'pack_weights']

SHIFTED = 32767  # what sums in int32 are shifted to fit into
WORD_TAPS = 256  # of a depthwise convolution, whose sums of bytes by words int32 holds
LANES = [8 * (i % 16 // 4) + 4 * (i // 16) + i % 4 for i in range(32)]  # where _mm512_packs_epi32 leaves each channel


def flow(layer: Layer) -> int:
    """Which of the engine's ways from sums to maps a convolution takes."""
    x, out, res = layer.ins[0].is8, layer.outs[0].is8, layer.res is None or layer.res.is8
    if x and out and res:
        return FLOW.BYTES
    if x:
        return FLOW.FROM_BYTES
    return FLOW.FROM_HALF if out or (layer.res is not None and res) else FLOW.HALF


def _fills_its_room(value: Value) -> bool:
    """Whether what lies behind a map's channels, up to a multiple of 32, is made of numbers of the same pixel.

    A product reads it and multiplies it by zero, which leaves a zero of numbers alone: a pixel's neighbour may be of
    another image, and what is left from an earlier layer or call may be no number.
    """
    layer, buffer = value.layer, value.buffer
    if (layer is None or buffer is None or layer.op != 'conv' or layer.depthwise or value.base is not None
            or buffer.c != value.c or buffer.stride < 2 * _up(value.c, 32)):
        return False
    res = layer.res
    return res is None or res.is8 or (res.c == value.c and (res.c % 32 == 0 or _fills_its_room(res)))


def pack_weights(layer: Layer, tiles: bool) -> Dict[str, Any]:
    """Blocks of 32 output channels in the order the tiles want, and what the engine must know of them.

    Args:
        layer: A dense convolution.
        tiles: Whether the engine multiplies in tiles, which have float16 beside them to go from sums of bytes to bytes.

    Returns:
        ``mode``, ``tap_c``, ``ksteps``, ``koff`` and ``channel_blocks`` as the engine has them; ``kcount``, of each
        step how many times four bytes are there, and the others are not multiplied, of which tiles know nothing; the
        tensors ``weights`` and ``bias``, and of maps in bytes ``epilogue``; ``dense`` if a step takes what lies side by
        side in a row of the kernel, over the borders of its taps; and ``blocks``: the output each belongs to, its first
        channel there, how many, and where in the input its channels begin, in bytes.
    """
    x = layer.ins[0]
    kh, kw = layer['kernel']
    groups, stride = layer['groups'], layer['stride']
    point = kh == kw == 1
    step = 64 // x.item  # channels of a step of the product
    # What lies behind a number of channels that is no multiple of a step is multiplied by zero, and must be a number.
    clean = x.is8 or x.c % 32 == 0 or _fills_its_room(x)
    if point and stride == 1 and tuple(layer['pad']) == (0, 0) and clean:
        mode = MODE.DIRECT
    elif groups == 1 and (x.c < 16 if x.is8 and not tiles else x.c % 32 and (x.c <= 48 or point) and not x.is8):
        mode = MODE.PATCH
    elif not point:
        mode = MODE.BAND
    else:
        mode = MODE.PATCH
    per_group = x.c // groups
    tight = mode == MODE.PATCH and groups == 1 and x.c % step != 0
    dense = mode == MODE.BAND and x.is8 and groups == 1 and x.c % step != 0 and layer['dilation'] == 1
    tap_c = x.c if tight else _up(x.c, 16 if dense else step)

    def in_steps(w: torch.Tensor) -> torch.Tensor:
        """Kernels ``(N, C, kh, kw)`` as ``(N, K)``, with zeros up to whole steps."""
        if tight:
            flat = w.permute(0, 2, 3, 1)
        elif dense:
            rows = F.pad(w, (0, 0, 0, 0, 0, tap_c - x.c)).permute(0, 2, 3, 1).flatten(2)
            flat = F.pad(rows, (0, -(kw * tap_c) % step))
        else:  # K runs over blocks of channels, within them over the taps; without tiles the other way round
            w = F.pad(w, (0, 0, 0, 0, 0, -per_group % step))
            flat = w.reshape(len(w), -1, step, kh * kw).permute((0, 1, 3, 2) if tiles else (0, 3, 1, 2))
        flat = flat.flatten(1)
        return F.pad(flat, (0, -flat.shape[1] % step))

    there = in_steps(torch.ones(1, per_group, kh, kw)).view(-1, 16, step // 16).any(2)
    ksteps = len(there)
    kcount = (there * torch.arange(1, 17)).amax(1).tolist()
    kept = torch.arange(16) < torch.tensor(kcount)[:, None]
    panels, biases, blocks, epilogues = [], [], [], []
    for index, (weight, bias) in enumerate(zip(layer.weights, layer.biases)):
        out_c = weight.shape[0]
        out_per_group = out_c // groups
        numbers: Dict[str, torch.Tensor] = {}
        if flow(layer) != FLOW.HALF:
            weight, bias, numbers = _in_bytes(layer, index, tiles)
        for g in range(groups):
            for first in range(g * out_per_group, (g + 1) * out_per_group, 32):
                count = min(32, (g + 1) * out_per_group - first)
                w = weight[first:first + count]
                w = F.pad(w, (0, 0, 0, 0, 0, 0, 0, 32 - count))
                panel = in_steps(w).view(2, 16, ksteps, 16, step // 16)
                panel = panel.permute(2, 0, 3, 1, 4) if tiles else panel[:, :, kept].permute(2, 0, 1, 3)
                panels.append(panel.contiguous())
                biases.append(F.pad(bias[first:first + count], (0, 32 - count)))
                blocks.append((index, first, count, g * per_group * x.item))
                if numbers:
                    epilogues.append(_epilogue(
                        {k: F.pad(v[first:first + count], (0, 32 - count)) for k, v in numbers.items()}))
    koff: List[int] = []  # of a band it depends on the number of rows
    if tight or mode == MODE.DIRECT:
        koff = [k * 64 for k in range(ksteps)]
    elif mode == MODE.PATCH:
        koff = [tap * tap_c * x.item + cb * 64
                for cb, tap in in_order(_up(per_group, step) // step, range(kh * kw), tiles)]
    packed = dict(
        mode=mode, tap_c=tap_c, ksteps=ksteps, koff=koff, kcount=kcount, channel_blocks=_up(per_group, step) // step,
        blocks=blocks, dense=dense,
        weights=torch.stack(panels).to(torch.int8 if x.is8 else torch.bfloat16).contiguous(),
        bias=torch.cat(biases).to(torch.int32 if x.is8 else torch.float32).contiguous())
    packed['panel'] = panels[0].numel() * x.item
    if epilogues:
        packed['epilogue'] = torch.stack(epilogues)
    return packed


def pack_depthwise(layer: Layer, tiles: bool) -> Dict[str, Any]:
    """Weights and bias of a depthwise convolution, of maps in bytes with their scales and zeros in them.

    Args:
        layer: The convolution.
        tiles: Whether the engine multiplies in tiles; it has not been measured to be faster by words then.

    Returns:
        The tensors ``weights`` and ``bias``, and ``flow``: ``FLOW.BYTES`` if the weights are words, else ``FLOW.HALF``.
    """
    weight, bias, x = layer.weights[0], layer.biases[0], layer.ins[0]
    if x.is8:
        scale, zero, _ = x.tables
        weight = weight * scale[:x.c, None, None, None]
        bias = bias - weight.sum((1, 2, 3)) * zero[:x.c]
    pad = -len(bias) % 32
    bias = F.pad(bias, (0, pad))
    weight = F.pad(weight[:, 0].permute(1, 2, 0), (0, pad)).float()  # (kh, kw, C)
    kh, kw, c = weight.shape
    if tiles or not x.is8 or layer['dilation'] > 1 or kh * kw > WORD_TAPS:
        return dict(weights=weight.contiguous(), bias=bias.contiguous(), flow=FLOW.HALF)
    unit = weight.abs().amax((0, 1)).clamp(min=1e-30) / 32767
    # Two rows side by side, and the channels as unpacking leaves them: of each eight the first four, then the others.
    pairs = F.pad((weight / unit).round(), (0, 0, 0, 0, 0, kh % 2)).view(-1, 2, kw, c // 32, 4, 2, 4)
    words = pairs.permute(0, 2, 3, 5, 4, 6, 1).to(torch.int16).contiguous()
    return dict(weights=words, bias=torch.cat([bias, unit]).contiguous(), flow=FLOW.BYTES)


def in_order(channel_blocks: int, taps: Iterable[Any], tiles: bool) -> Iterable[Tuple[int, Any]]:
    """The order in which a product goes through blocks of channels and taps, where a step has one of each."""
    if tiles:
        return itertools.product(range(channel_blocks), taps)
    return ((cb, tap) for tap in taps for cb in range(channel_blocks))


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _in_bytes(layer: Layer, index: int, tiles: bool) -> Tuple[torch.Tensor, torch.Tensor, Dict[str, torch.Tensor]]:
    """Weights and bias of one output for maps in bytes, and by channel the numbers of what follows the sums.

    A sum of products of bytes stands for ``unit`` times itself. Beside tiles, it is shifted into sixteen bits with the
    bias, and everything from there to the bytes of the result is float16; without them, or where one of the two maps is
    not in bytes, everything is float32 and there is no shift.
    """
    x, out, res, groups = layer.ins[0], layer.outs[index], layer.res, layer['groups']
    weight, bias = layer.weights[index].double(), layer.biases[index].double()
    ones = torch.ones_like(bias)
    inverse, zero = (1 / out.scale.double(), out.zero.double()) if out.is8 else (ones, 0 * ones)  # type: ignore[union-attr]
    res_mul, res_add = ones, 0 * ones
    if res is not None and res.is8:
        res_mul = res.scale.double()  # type: ignore[union-attr]
        res_add = -res.zero.double() * res_mul  # type: ignore[union-attr]
    kind = flow(layer)
    if not x.is8:
        return weight.float(), bias.float(), dict(
            mul=ones, res_mul=res_mul, res_add=res_add, inv=inverse, add=zero)
    # Each group has the scales of its own channels.
    scales, zeros = (
        v.double().view(groups, 1, -1).expand(-1, len(bias) // groups, -1).reshape(len(bias), -1)[..., None, None]
        for v in (x.scale, x.zero))  # type: ignore[union-attr]
    weight = weight * scales
    limit = 2 * layer.peaks[index] * ones  # of a sum, twice of what there was
    linear = layer.act in ('none', 'relu', 'leaky_relu')
    if layer.res_mode == 1:
        limit = limit + res_add.abs()
    if not linear:
        limit = limit.clamp(min=2.)
    given = layer.units[index]
    unit = weight.flatten(1).abs().amax(dim=1) / 127 if given is None else given.double()
    unit = torch.maximum(unit, limit / 2 ** 30).clamp(min=1e-30)
    weight = (weight / unit[:, None, None, None]).round().clamp(-127, 127)
    if kind == FLOW.BYTES and layer.res_mode == 1:
        bias = bias + res_add
    bias = (bias / unit - (weight * zeros).sum((1, 2, 3))).round().clamp(-2 ** 30, 2 ** 30)
    if kind == FLOW.FROM_BYTES:
        return weight.float(), bias, dict(mul=unit, res_mul=res_mul, res_add=res_add, inv=inverse, add=zero)
    numbers = {}
    mul = unit
    if tiles:
        numbers['shift'] = shift = (limit / unit / SHIFTED).clamp(min=1.).log2().ceil()
        bias = bias + (2 ** shift / 2).floor()  # what is shifted out is rounded
        mul = unit * 2 ** shift
    if layer.res_mode == 2:
        zero = zero + res_add * inverse
        res_mul = res_mul * inverse
    if linear:  # in steps of the result throughout
        mul = mul * inverse
        res_mul = res_mul * inverse if layer.res_mode == 1 else res_mul
        inverse = ones
    return weight.float(), bias, dict(numbers, mul=mul, res_mul=res_mul, res_add=0 * ones, inv=inverse, add=zero)


def _epilogue(numbers: Dict[str, torch.Tensor]) -> torch.Tensor:
    """The numbers of 32 channels as the engine's structures have them, in bytes."""
    if 'shift' not in numbers:
        return torch.cat([numbers[k].float() for k in ('mul', 'res_mul', 'res_add', 'inv', 'add')]).view(torch.uint8)
    lanes = torch.empty(32, dtype=torch.long)
    lanes[torch.tensor(LANES)] = torch.arange(32)
    halves = torch.cat([numbers[k][lanes].half() for k in ('mul', 'res_mul', 'inv', 'add')])
    return torch.cat([numbers['shift'].int().view(torch.uint8), halves.view(torch.uint8)])
