"""Reading a network into a :class:`~cspnet_timm.deployment.native.plan.Plan`, by ``torch.export``."""
import operator
import re
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn

from .plan import Plan, UnsupportedNetwork

__all__ = ['lower']

_SAME = {'dropout', 'dropout_', 'feature_dropout', 'alias', 'clone', 'contiguous', 'detach', 'to', 'lift_fresh_copy',
         'detach_', '_to_copy'}
_ACTS = {'relu', 'silu', 'hardswish', 'hardsigmoid', 'sigmoid', 'mish', 'relu6', 'leaky_relu', 'hardtanh', 'clamp'}


def lower(model: nn.Module, example: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> Plan:
    """Read a network into a plan.

    Args:
        model: The network, in eval mode, float32, on the CPU; it gives one tensor or a list of tensors.
        example: An image, or several.
        dtype: What the weights are kept in.

    Returns:
        The plan, with its own copy of the weights (those of depthwise convolutions and all biases in float32).

    Raises:
        UnsupportedNetwork: If the network does what the engine does not know; the message names it.
    """
    if example.ndim != 4:
        raise UnsupportedNetwork(f'The native engine takes images (B, C, H, W), and the example is {example.ndim}-d.')
    try:
        with torch.no_grad():
            program = torch.export.export(model, (example,), strict=False)
    except Exception as error:  # PyTorch has many
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UnsupportedNetwork(
            f'The native engine reads what torch.export reads, and not this network: {lines[0][:200]}') from error
    return _Lowering(program, example, dtype).plan()


class _Lowering:
    def __init__(self, program: torch.export.ExportedProgram, example: torch.Tensor, dtype: torch.dtype) -> None:
        self.program = program
        self.example = example
        self.dtype = dtype
        self.operations: List[Dict[str, Any]] = []
        self.tensors: Dict[str, torch.Tensor] = {}
        self.values: Dict[torch.fx.Node, int] = {}
        self.parameters: Dict[str, torch.Tensor] = {}
        self.lists: Dict[torch.fx.Node, List[int]] = {}
        self.sampled: Dict[torch.fx.Node, Tuple[int, int]] = {}  # rows taken at a step, the columns not yet
        self.sizes: Dict[int, Tuple[int, ...]] = {}  # height and width of values
        self.views: set = set()  # nodes that share memory with another one
        self.node: Any = None  # that is read
        self.sources: List[torch.fx.Node] = []  # of each operation

    def plan(self) -> Plan:
        signature = self.program.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers,
                 **signature.inputs_to_lifted_tensor_constants}
        everything = {**self.program.state_dict, **self.program.constants}
        outputs: List[Tuple[int, bool]] = []
        for node in self.program.graph.nodes:
            if node.op == 'placeholder':
                if node.name in names:
                    self.parameters[node.name] = everything[names[node.name]].detach()
                else:
                    self.values[node] = 0
            elif node.op == 'call_function':
                self._call(node)
            elif node.op == 'output':
                for out in torch.utils._pytree.tree_leaves(node.args):
                    if not isinstance(out, torch.fx.Node):
                        raise UnsupportedNetwork(f'The native engine gives tensors, and the network {out!r}.')
                    if out.meta['val'].ndim not in (2, 4):
                        raise self._refuse(out, f' as an output of {out.meta["val"].ndim} dimensions')
                    outputs.append((self._value(out), out.meta['val'].ndim == 2))
        for i, op in enumerate(self.operations):
            if op['op'] == 'conv':
                weight = self.tensors[f'{i}.weight'].float()
                depthwise = weight.shape[1] == 1 and op['groups'] == weight.shape[0]
                weight = weight.contiguous() if depthwise else weight.to(self.dtype).contiguous()
                self.tensors[f'{i}.weight'] = weight.detach().clone()
        _, channels, height, width = self.example.shape
        try:
            return Plan((channels, height, width), self.operations, outputs, self.tensors,
                        names=[_path(node) for node in self.sources])
        except ValueError as error:  # larger than anything the engine is for
            found = re.search(r'operations\[(\d+)\]|tensor (\d+)\.', str(error))
            if found is None:
                raise UnsupportedNetwork(f'The native engine cannot run this network. {error}') from error
            node = self.sources[int(found[1] or found[2])]
            raise self._refuse(node, f': {str(error).rstrip(".")}') from error

    def _refuse(self, node: torch.fx.Node, why: str = '') -> UnsupportedNetwork:
        path = _path(node)
        where = f' in {path}' if path else ''
        return UnsupportedNetwork(f'The native engine does not know {node.target}{where}{why}.')

    def _emit(self, op: str, **fields: Any) -> int:
        self.operations.append({'op': op, **fields})
        self.sources.append(self.node)
        return len(self.operations)

    def _value(self, node: Any) -> int:
        if not isinstance(node, torch.fx.Node) or node not in self.values:
            raise UnsupportedNetwork(f'The native engine does not know the use of {node} as a map.')
        return self.values[node]

    def _parameter(self, node: Any) -> Optional[torch.Tensor]:
        if node is None:
            return None
        if not isinstance(node, torch.fx.Node) or node.name not in self.parameters:
            raise UnsupportedNetwork(f'The native engine does not know weights that are computed: {node}.')
        return self.parameters[node.name]

    def _conv(self, x: int, weight: torch.Tensor, bias: Optional[torch.Tensor], **fields: Any) -> int:
        i = len(self.operations)
        fields = {'stride': 1, 'pad': [0, 0], 'dilation': 1, 'groups': 1, **fields}
        bias = torch.zeros(weight.shape[0]) if bias is None else bias.float().clone()
        self.tensors[f'{i}.weight'], self.tensors[f'{i}.bias'] = weight, bias
        return self._emit('conv', x=x, **fields)

    def _call(self, node: torch.fx.Node) -> None:
        self.node = node
        if node.target is operator.getitem and node.args[0] in self.lists:
            self.values[node] = self.lists[node.args[0]][node.args[1]]  # type: ignore[index]
            self.views.add(node)
            return
        name = getattr(node.target, '_opname', None) or str(node.target)
        if name == '_assert_tensor_metadata':  # of a conversion that follows
            return
        bound = self._arguments(node)
        method = getattr(self, f'_op_{name.rstrip("_") if not name.startswith("_") else name}', None)
        x = node.args[0] if node.args else None
        if name in _SAME and not bound.get('train', False):
            if not node.meta['val'].is_floating_point():
                raise self._refuse(node, f' to {node.meta["val"].dtype}')
            self.values[node] = self._value(x)
            self.views.add(node)
            return
        if name in ('add_', 'mul_', 'batch_norm_') or (name.endswith('_') and name[:-1] in _ACTS):
            # What is changed in place is from here on another value; that is all, if nobody else sees its memory.
            if x in self.views or any(user in self.views for user in x.users):  # type: ignore[union-attr]
                raise self._refuse(node, ', which changes a part of another map')
        if name.rstrip('_') in _ACTS:
            result: Any = self._act(node, name.rstrip('_'), bound)
        elif method is None:
            raise self._refuse(node)
        else:
            result = method(node, bound)
        if result is None:
            return
        self.values[node] = result
        if node.meta['val'].ndim == 4:
            self.sizes[result] = tuple(node.meta['val'].shape[2:])
        if name.endswith('_') and isinstance(x, torch.fx.Node):
            self.values[x] = result

    def _arguments(self, node: torch.fx.Node) -> Dict[str, Any]:
        schema = getattr(node.target, '_schema', None)
        if schema is None:
            raise self._refuse(node)
        bound = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        bound.update({a.name: v for a, v in zip(schema.arguments, node.args)})
        bound.update(node.kwargs)
        return bound

    def _act(self, node: torch.fx.Node, name: str, a: Dict[str, Any]) -> int:
        slope = 0.
        if name == 'leaky_relu':
            slope = float(a['negative_slope'])
        if name in ('hardtanh', 'clamp'):
            limits = (a['min_val'], a['max_val']) if name == 'hardtanh' else (a['min'], a['max'])
            if limits != (0, 6):
                raise self._refuse(node, f' to {limits}')
            name = 'relu6'
        return self._emit('act', x=self._value(node.args[0]), kind=name, slope=slope)

    def _op_conv2d(self, node: torch.fx.Node, a: Dict[str, Any]) -> int:
        weight = self._parameter(a['weight'])
        assert weight is not None
        stride, dilation, pad = _two(a['stride']), _two(a['dilation']), a['padding']
        if pad == 'valid':
            pad = 0
        if isinstance(pad, str):
            whole = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:])]
            if any(v % 2 for v in whole):
                raise self._refuse(node, ' with padding that is not symmetric')
            pad = [v // 2 for v in whole]
        if stride[0] != stride[1] or dilation[0] != dilation[1]:
            raise self._refuse(node, f' with stride {stride} and dilation {dilation}')
        return self._conv(self._value(node.args[0]), weight, self._parameter(a['bias']), stride=stride[0],
                          pad=_two(pad), dilation=dilation[0], groups=a['groups'])

    def _op_linear(self, node: torch.fx.Node, a: Dict[str, Any]) -> int:
        weight = self._parameter(a['weight'])
        assert weight is not None
        if node.args[0].meta['val'].ndim != 2:  # type: ignore[union-attr]
            raise self._refuse(node, ' of more than a vector')
        return self._conv(self._value(node.args[0]), weight[:, :, None, None], self._parameter(a['bias']))

    def _op_batch_norm(self, node: torch.fx.Node, a: Dict[str, Any]) -> int:
        mean, var = self._parameter(a['running_mean']), self._parameter(a['running_var'])
        weight, bias = self._parameter(a['weight']), self._parameter(a['bias'])
        if a['training'] or mean is None or var is None:
            raise self._refuse(node, ' in training mode')
        scale = (var.double() + a['eps']).rsqrt() * (1. if weight is None else weight.double())
        shift = (0. if bias is None else bias.double()) - mean.double() * scale
        x = self._value(node.args[0])
        source = self.operations[x - 1] if x else {'op': ''}
        if source['op'] == 'conv' and self._alone(node.args[0]):
            kernel, old = self.tensors[f'{x - 1}.weight'], self.tensors[f'{x - 1}.bias']
            self.tensors[f'{x - 1}.weight'] = (kernel.double() * scale[:, None, None, None]).float()
            self.tensors[f'{x - 1}.bias'] = (old.double() * scale + shift).float()
            return x
        return self._conv(x, scale.float()[:, None, None, None], shift.float(), groups=len(scale))

    def _alone(self, node: Any) -> bool:
        """Whether a value is read once, by whatever name."""
        while len(node.users) == 1:
            before = node.args[0] if node.args else None
            if not isinstance(before, torch.fx.Node) or self.values.get(before) != self.values[node]:
                return True
            node = before
        return False

    def _binary(self, op: str, node: torch.fx.Node, a: Dict[str, Any]) -> int:
        x, y = a['self'], a['other']
        if a.get('alpha', 1) != 1 or not all(isinstance(v, torch.fx.Node) and v in self.values for v in (x, y)):
            raise self._refuse(node, ' of a map and a number')
        if x.meta['val'].shape != node.meta['val'].shape:
            x, y = y, x
        ranks = x.meta['val'].ndim, y.meta['val'].ndim
        if x.meta['val'].shape != node.meta['val'].shape or ranks[0] != ranks[1] or (
                y.meta['val'].shape != x.meta['val'].shape and (
                    op == 'add' or y.meta['val'].shape != (*x.meta['val'].shape[:2], 1, 1))):
            raise self._refuse(node, f' of {tuple(x.meta["val"].shape)} and {tuple(y.meta["val"].shape)}')
        return self._emit(op, x=self.values[x], y=self.values[y])

    def _op_add(self, node: torch.fx.Node, a: Dict[str, Any]) -> int:
        return self._binary('add', node, a)

    def _op_mul(self, node: torch.fx.Node, a: Dict[str, Any]) -> int:
        return self._binary('mul', node, a)

    def _op_cat(self, node: torch.fx.Node, a: Dict[str, Any]) -> int:
        if a['dim'] not in (1, 1 - node.meta['val'].ndim):
            raise self._refuse(node, f' along dimension {a["dim"]}')
        values = [self._value(v) for v in a['tensors']]
        return values[0] if len(values) == 1 else self._emit('cat', xs=values)

    def _op_slice(self, node: torch.fx.Node, a: Dict[str, Any]) -> Optional[int]:
        source: Any = node.args[0]
        shape = source.meta['val'].shape  # type: ignore[union-attr]
        size, step = shape[a['dim']], a['step']
        start, stop = a['start'] or 0, size if a['end'] is None else a['end']
        start, stop = (max(v + size, 0) if v < 0 else min(v, size) for v in (start, stop))
        dim = a['dim'] % len(shape)
        self.views.add(node)
        if dim == 0 and ((start, step) != (0, 1) or (a['end'] is not None and a['end'] < 1 << 62)):
            raise self._refuse(node, ' of the batch')
        if step == 1 and (start, stop) == (0, size):
            if source in self.sampled:
                self.sampled[node] = self.sampled[source]
                return None
            return self._value(source)
        if dim == 1 and step == 1 and source in self.values:
            return self._emit('slice', x=self.values[source], start=start, stop=stop)
        if dim == 2 and start == 0 and stop == size and source in self.values:
            self.sampled[node] = self.values[source], step
            return None
        if dim == 3 and start == 0 and stop == size and source in self.sampled and self.sampled[source][1] == step:
            return self._emit('pool', x=self.sampled[source][0], kind='max', kernel=[1, 1], stride=step, pad=[0, 0],
                              ceil=False)
        raise self._refuse(node, f' of dimension {dim} from {start} to {stop} at a step of {step}')

    def _parts(self, node: torch.fx.Node, sizes: List[int]) -> None:
        x, start = self._value(node.args[0]), 0
        self.views.add(node)
        self.lists[node] = []
        for size in sizes:
            self.lists[node].append(self._emit('slice', x=x, start=start, stop=start + size))
            start += size

    def _op_split(self, node: torch.fx.Node, a: Dict[str, Any]) -> None:
        if a['dim'] not in (1, -3):
            raise self._refuse(node, f' along dimension {a["dim"]}')
        self._parts(node, [v.shape[1] for v in node.meta['val']])

    _op_split_with_sizes = _op_split
    _op_chunk = _op_split

    def _op_pad(self, node: torch.fx.Node, a: Dict[str, Any]) -> int:
        pad = [*a['pad'], *[0] * (8 - len(a['pad']))]
        if a['mode'] != 'constant' or a['value'] not in (None, 0) or any(pad[:4] + pad[6:]) or min(pad) < 0:
            raise self._refuse(node, f' by {a["pad"]}')
        x = self._value(node.args[0])
        parts = [x]
        if pad[4]:
            parts.insert(0, self._emit('zeros', x=x, channels=pad[4]))
        if pad[5]:
            parts.append(self._emit('zeros', x=x, channels=pad[5]))
        return self._emit('cat', xs=parts) if len(parts) > 1 else x

    def _pool(self, node: torch.fx.Node, a: Dict[str, Any], kind: str) -> int:
        stride = _two(a['stride'] or a['kernel_size'])
        if stride[0] != stride[1] or _two(a.get('dilation', 1)) != [1, 1] or a.get('divisor_override') is not None:
            raise self._refuse(node, f' with stride {stride}')
        return self._emit('pool', x=self._value(node.args[0]), kind=kind, kernel=_two(a['kernel_size']),
                          stride=stride[0], pad=_two(a['padding']), ceil=bool(a['ceil_mode']))

    def _op_max_pool2d(self, node: torch.fx.Node, a: Dict[str, Any]) -> int:
        return self._pool(node, a, 'max')

    def _op_avg_pool2d(self, node: torch.fx.Node, a: Dict[str, Any]) -> int:
        return self._pool(node, a, 'mean_padded' if a['count_include_pad'] else 'mean')

    def _op_adaptive_avg_pool2d(self, node: torch.fx.Node, a: Dict[str, Any]) -> int:
        if list(_two(a['output_size'])) != [1, 1]:
            raise self._refuse(node, f' to {a["output_size"]}')
        return self._emit('mean', x=self._value(node.args[0]))

    def _op_mean(self, node: torch.fx.Node, a: Dict[str, Any]) -> int:
        dims = sorted(d % 4 for d in a.get('dim') or [])
        if node.args[0].meta['val'].ndim != 4 or dims != [2, 3]:  # type: ignore[union-attr]
            raise self._refuse(node, f' over dimensions {a.get("dim")}')
        return self._emit('mean', x=self._value(node.args[0]))

    def _op_flatten(self, node: torch.fx.Node, a: Dict[str, Any]) -> int:
        before, after = node.args[0].meta['val'].shape, node.meta['val'].shape  # type: ignore[union-attr]
        allowed = (tuple(before), (*before[:2], 1, 1)[:len(after)])
        if len(after) < 2 or tuple(after) not in allowed or any(n != 1 for n in before[2:]):
            raise self._refuse(node, f' of {tuple(before)} to {tuple(after)}')
        self.views.add(node)
        return self._value(node.args[0])

    _op_view = _op_reshape = _op_squeeze = _op_flatten

    def _op_upsample_nearest2d(self, node: torch.fx.Node, a: Dict[str, Any]) -> int:
        before, after = node.args[0].meta['val'].shape, node.meta['val'].shape  # type: ignore[union-attr]
        # At another size of image, a map made to fit a neighbour will have to fit it again.
        like = next((v for v, size in reversed(self.sizes.items()) if size == tuple(after[2:])), None)
        scale = after[2] // before[2]
        factors = a.get('scale_factors') or [a.get('scales_h'), a.get('scales_w')]
        for size, out, factor in zip(before[2:], after[2:], factors):
            if out < size:
                raise self._refuse(node, f' of {tuple(before[2:])} to {tuple(after[2:])}')
            if factor is not None and factor * size != out:  # PyTorch then goes by the factor, not by the sizes
                raise self._refuse(node, f' by {factor} of {size}')
        whole = (before[2] * scale, before[3] * scale) == tuple(after[2:])
        if whole and None not in factors:
            like = None  # it goes by the factor, and what has the same size has it by chance
        if not whole and like is None:
            raise self._refuse(node, f' of {tuple(before[2:])} to {tuple(after[2:])}')
        return self._emit('upsample', x=self._value(node.args[0]), scale=scale, like=like)


def _path(node: torch.fx.Node) -> str:
    """What the network calls the module that a node comes from."""
    trace = list((node.meta.get('nn_module_stack') or {}).values())
    return trace[-1][0] if trace else ''


def _two(value: Any) -> List[int]:
    values = [value, value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values
