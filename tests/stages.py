"""Small networks that together hold every block and stage of the package once, in every form that a family uses.

What compilers, exporters, engines and whatever else walks through a network see are its layers, not its size: what they
make of these they make of every registered model. ``test_stages.py`` fails if a registered model has a form that none
of these has; it is then to be put into a level here.
"""
import functools
import re
from collections import OrderedDict

import timm
import torch.nn as nn
from timm.layers import EffectiveSEModule
from timm.models import generate_default_cfgs, register_model

from cspnet_timm.backbone import BackboneCfg, Level, LevelArgs, Neck
from cspnet_timm.blocks import (
    AttentionBlock,
    BasicBlock,
    BottleneckBlock,
    ConcatOutputs,
    DarkBlock,
    DenseBlock,
    DenseLayer,
    ElasticBlock,
    InvertedResidual,
)
from cspnet_timm.cross_stage import ComposedStage, CrossStage
from cspnet_timm.families._builder import build_backbone, default_cfg
from cspnet_timm.families.peleenet import StemPool, TwoWayLayer
from cspnet_timm.families.yolov9 import AverageDown, SplitDown
from cspnet_timm.layers import (
    ChannelSlice,
    ConvHead,
    ConvNormAct,
    RepConv,
    SamePad,
    SeparableConv,
    SpatialPyramidPool,
)
from cspnet_timm.neck import BottomUp, CrossingDown, CrossingPaths, CrossingUp, PathAggregation, TopDown

CHS = 16
LEAKY = functools.partial(nn.LeakyReLU, negative_slope=0.1)

separable = (ConvNormAct, SeparableConv)


class Asked(dict):
    """Drop path rates of any number of blocks, which keep what was asked for."""

    def __missing__(self, index):
        return self.setdefault(index, 0.)

    def __bool__(self):
        return True


def level(*parts):
    """A level of parts, each called with the input's channels and the level's arguments; all give 16 channels."""

    def build(in_chs, args):
        modules = OrderedDict()
        for i, part in enumerate(parts):
            modules[f'part{i}'] = part(CHS if i else in_chs, args)
        return nn.Sequential(modules)

    asked = Asked()
    layers = dict(act_layer='silu', norm_layer='batchnorm2d', device='meta', dtype=None)
    build(CHS, LevelArgs(2, 1, 1, asked, None, layers))
    return Level(build, CHS, depth=len(asked))


def down(cls=ConvNormAct, **kwargs):
    return lambda chs, args: cls(
        chs, CHS, kernel_size=3, stride=args.stride, dilation=args.first_dilation, **kwargs, **args.layers)


def down_same(chs, args):
    """A convolution with TensorFlow's padding."""
    return nn.Sequential(OrderedDict(pad=SamePad(args.first_dilation), conv=ConvNormAct(
        chs, CHS, 3, stride=args.stride, dilation=args.first_dilation, padding=0, **args.layers)))


def pool(cls, **kwargs):
    return lambda chs, args: cls(args.stride, args.stride, ceil_mode=True)


def row(*blocks):
    """Blocks in a row, each called with the channels and the arguments of the level."""
    return lambda chs, args: nn.Sequential(*[block(chs, args) for block in blocks])


def block(cls, *shape, index=0, **kwargs):
    """A block of as many channels as go in, unless others are given."""
    return lambda chs, args: cls(*(shape or (chs, chs)), **kwargs, **args.block_kwargs(index))


def stage(blocks, chs=CHS, **kwargs):
    return lambda in_chs, args: CrossStage(
        in_chs, chs, blocks=lambda c: blocks(c, args), **kwargs, **args.layers)


def attended(chs, args):
    return nn.Sequential(OrderedDict(
        attn=EffectiveSEModule(chs, device=args.layers['device'], dtype=args.layers['dtype']),
        conv=ConvNormAct(chs, CHS, **args.layers),
    ))


def composed(blocks, chs=CHS // 2, entry=True, transition=False, merge=None, bypass=None):
    """A stage of modules; ``bypass`` are the arguments of its convolution beside the channels."""

    def build(in_chs, args):
        layers = args.layers
        out = chs if bypass is None else in_chs
        made = blocks(chs if entry else in_chs, args)
        return ComposedStage(
            made,
            entry=ConvNormAct(in_chs, chs, **layers) if entry else None,
            bypass=ConvNormAct(in_chs, out, **(bypass or {}), **layers),
            transition=ConvNormAct(chs, chs, **layers) if transition else None,
            merge=(merge or (lambda c, args: ConvNormAct(c, CHS, **args.layers)))(
                getattr(made, 'out_chs', chs) + out, args),
        )

    return build


def attention(chs, args):
    return AttentionBlock(chs, drop_path=args.drop_path[0], **args.layers)


def concatenated(*blocks):
    def build(chs, args):
        return ConcatOutputs([b(chs, args) for b in blocks], (1 + len(blocks)) * chs)

    return build


def dense(cls, growth=8):
    def build(chs, args):
        layers = [cls(chs + i * growth, growth, growth, **args.block_kwargs(i)) for i in range(2)]
        return DenseBlock(layers, chs + 2 * growth)

    return build


def elastic(cls, **kwargs):
    def build(chs, args):
        block_kwargs = {**args.block_kwargs(0), 'drop_path': 0.}
        return ElasticBlock(
            chs, block=lambda half: cls(half, half, shortcut=False, **kwargs, **block_kwargs),
            act_layer=args.layers['act_layer'] if cls is BottleneckBlock else None, drop_path=args.drop_path[0])

    return build


def stem(*kernel_sizes):
    def build(in_chans, args):
        return nn.Sequential(OrderedDict(
            (f'conv{i}', ConvNormAct(CHS if i else in_chans, CHS, k, stride=1 if i else args.stride, **args.layers))
            for i, k in enumerate(kernel_sizes)))

    return Level(build, CHS)


def walks(chs, args):
    """A neck with every kind of node."""
    def halve(cls=ConvNormAct):
        return cls(CHS, CHS, kernel_size=3, stride=2, **args.layers)

    def keep(cls=ConvNormAct):
        return cls(CHS, CHS, kernel_size=3, **args.layers)

    def merge(blocks=None, chs=2 * CHS):
        return stage(blocks or row(dark), fusion='first')(chs, args)

    def reduce(out_chs=CHS):
        return ConvNormAct(CHS, out_chs, **args.layers)

    def unreduced(chs, args):
        return SpatialPyramidPool(chs, chs, reduce=False, **args.layers)

    def around(chs):  # a stage around which its input passes through a convolution
        return nn.Sequential(OrderedDict(conv=ConvNormAct(chs, CHS, **args.layers), csp=ComposedStage(
            row(thin)(CHS, args), bypass=reduce(), merge=ConvNormAct(2 * CHS, CHS, **args.layers))))

    rep = block(DarkBlock, kernel_size=(3, 3), conv_layers=(ConvNormAct, RepConv), shortcut=False)
    return PathAggregation(
        [
            TopDown(nn.Sequential(OrderedDict(csp=merge(), reduce=reduce()))),
            TopDown(around(CHS // 2 + CHS), reduce(CHS // 2), lateral=reduce()),
        ],
        [
            BottomUp(merge(row(block(DarkBlock, kernel_size=(3, 5), conv_layers=separable, shortcut=False))), halve()),
            BottomUp(merge(), halve(SeparableConv)),
        ],
        top=nn.Sequential(
            merge(row(rep, unreduced), chs=CHS), composed(row(thin, unreduced, plain))(CHS, args)),
        outputs=[keep(), nn.Identity(), keep(SeparableConv)],
    )


def crossings(chs, args):
    """The neck of DAMO-YOLO, whose walks cross and whose stages collect what the blocks give alone."""
    def halve():
        return ConvNormAct(CHS, CHS, kernel_size=3, stride=2, **args.layers)

    def merge(num_maps):
        half, (first, second) = CHS // 2, [block(DarkBlock, kernel_size=(3, 3))(CHS // 2, args) for _ in range(2)]
        return ComposedStage(
            ConcatOutputs([second], 2 * half),
            entry=nn.Sequential(OrderedDict(conv=ConvNormAct(num_maps * CHS, half, **args.layers), block=first)),
            bypass=ConvNormAct(num_maps * CHS, half, **args.layers),
            merge=ConvNormAct(3 * half, CHS, **args.layers),
        )

    return CrossingPaths(
        [CrossingDown(merge(3), halve()), CrossingDown(merge(2))],
        [CrossingUp(merge(2), halve()), CrossingUp(merge(3), halve(), halve())],
        top=CrossingDown(merge(2), halve()),
    )


dark = block(DarkBlock)
thin = block(DarkBlock, shortcut=False)



def split_second_half(chs, args):
    """YOLOv4-tiny's stage, which nothing merges."""
    return nn.Sequential(OrderedDict(
        conv=ConvNormAct(chs, CHS // 2, **args.layers),
        csp=ComposedStage(
            entry=nn.Sequential(OrderedDict(split=ChannelSlice(CHS // 4, CHS // 2), conv=ConvNormAct(
                CHS // 4, CHS // 4, 3, dilation=args.dilation, **args.layers))),
            blocks=ConcatOutputs([ConvNormAct(CHS // 4, CHS // 4, 3, **args.layers)], CHS // 2),
            transition=ConvNormAct(CHS // 2, CHS // 2, **args.layers),
            bypass_first=True,
        ),
    ))


def averaged(cls):
    return lambda chs, args: cls(chs, CHS, args.stride, args.first_dilation, **args.layers)


def inner(chs, args):
    """A part of YOLOv9's stage."""
    rep = block(DarkBlock, kernel_size=(3, 3), conv_layers=(RepConv, ConvNormAct))
    return nn.Sequential(OrderedDict(
        csp=stage(row(rep), chs, fusion='first')(chs, args), conv=plain(chs, args)))


def plain(chs, args):
    return ConvNormAct(chs, chs, 3, dilation=args.dilation, **args.layers)


NETWORKS = {
    # YOLO and its like: residual blocks, plain, separable and re-parameterisable; chains that keep every output.
    'detectors': BackboneCfg(
        levels=(
            stem(6),
            level(down(), stage(row(dark, dark), fusion='first')),
            level(down(SeparableConv), composed(row(
                block(DarkBlock, kernel_size=(3, 5), conv_layers=separable),
                block(DarkBlock, kernel_size=(3, 5), conv_layers=separable, shortcut=False),
                block(DarkBlock, kernel_size=(3, 5), conv_layers=(SeparableConv, SeparableConv)),
                block(DarkBlock, kernel_size=(3, 5), conv_layers=(SeparableConv, SeparableConv), shortcut=False),
            ), merge=attended)),
            level(down(), composed(row(
                block(DarkBlock, kernel_size=(3, 3), conv_layers=(ConvNormAct, RepConv)),
                block(DarkBlock, kernel_size=(3, 3), conv_layers=(
                    ConvNormAct, functools.partial(RepConv, alpha=True))),
            ), merge=attended)),
            level(
                down(),
                stage(concatenated(block(DarkBlock, kernel_size=(3, 3)), thin), fusion='first'),
                stage(concatenated(lambda chs, args: stage(row(dark), chs, fusion='first')(chs, args)), fusion='first'),
                lambda chs, args: SpatialPyramidPool(chs, chs, **args.layers),
                lambda chs, args: SpatialPyramidPool(chs, chs, shortcut=True, **args.layers),
            ),
        ),
        bn_eps=1e-3,
        head=functools.partial(ConvHead, hidden_size=24),
    ),
    # YOLOv9's and DAMO-YOLO's: what averages before it strides, stages within a stage, an activation behind a sum.
    'averaging': BackboneCfg(levels=(
        stem(3),
        level(averaged(AverageDown), composed(concatenated(inner, inner))),
        level(averaged(SplitDown), composed(concatenated(plain, plain))),
        level(down(), composed(row(block(BasicBlock, conv_layers=(ConvNormAct, RepConv))))),
    )),
    # By themselves, because the native engine has neither attention nor TensorFlow's padding.
    'attention': BackboneCfg(levels=(
        stem(3),
        level(down(), row(dark, dark)),
        level(down()),
        level(
            down(), stage(row(attention), fusion='first'), row(dark),
            stage(concatenated(row(dark, attention)), fusion='first')),
    )),
    'padding': BackboneCfg(levels=(stem(6), *[level(down_same, row(dark))] * 3)),
    # The paper's: bottlenecks, inverted residuals, elastic and dense blocks, channels that are split.
    'paper': BackboneCfg(
        levels=(
            stem(3, 3),
            level(
                pool(nn.MaxPool2d),
                split_second_half,
                composed(row(block(BottleneckBlock), block(BottleneckBlock, groups=4)), transition=True),
                stage(row(dark), fusion='csp'),
                stage(row(elastic(DarkBlock)), fusion='csp'),
            ),
            level(
                down(groups=4),
                composed(row(elastic(BottleneckBlock)), transition=True),
                composed(row(
                    block(InvertedResidual, CHS, 12, depth_multiplier=2),
                    block(InvertedResidual, 12, CHS // 2, 24),
                    block(InvertedResidual, CHS // 2, CHS // 2, 24),
                ), entry=False, bypass=dict(kernel_size=3, groups=CHS)),
            ),
            level(
                lambda chs, args: StemPool(chs, args.stride, **args.layers),
                stage(dense(TwoWayLayer), partition='split'),
            ),
            level(
                pool(nn.AvgPool2d),
                stage(dense(DenseLayer), chs=16, partition='split', transition_chs=8, merge=False),
            ),
        ),
        act_layer=LEAKY,
    ),
    # The pyramid behind a backbone.
    'neck': BackboneCfg(
        levels=(stem(3), *[level(down(), stage(row(block(DarkBlock)), fusion='first'))] * 3),
        neck=Neck(walks, (CHS,) * 3),
    ),
    'crossing': BackboneCfg(
        levels=(stem(3), *[level(down(), row(dark))] * 3), neck=Neck(crossings, (CHS,) * 3)),
}


def _register(name, cfg):
    """Make one of the networks known to timm, so that it is created and checked like any other."""

    def entrypoint(pretrained=False, **kwargs):
        return build_backbone(name, pretrained, cfg, **kwargs)

    entrypoint.__name__, entrypoint.__module__, entrypoint.__doc__ = name, __name__, 'Of tests alone.'
    register_model(entrypoint)


__all__ = []  # to which timm adds their names
NETWORKS = {f'stages_{name}': cfg for name, cfg in NETWORKS.items()}
default_cfgs = generate_default_cfgs({
    f'{name}.untrained': default_cfg(first_conv='stem.conv0.conv', input_size=(3, 64, 64), pool_size=None)
    for name in NETWORKS
})
for _name, _cfg in NETWORKS.items():
    _register(_name, _cfg)


def form(module):
    """What decides which code of a module runs: its class, its flags, what its children are."""
    flags = sorted(k for k, v in vars(module).items() if isinstance(v, bool) and k not in _STATE and v)
    children = sorted({(re.sub(r'\d+', '', name), kind) for name, kind in _children(module)})
    if type(module).__module__ == PathAggregation.__module__:  # which call whatever they are given
        children = []
    return type(module).__name__, tuple(flags), tuple(children)


_STATE = {'training', 'grad_checkpointing', 'inplace'}
_PLAIN = {nn.Sequential, nn.ModuleList}


def _children(module):
    for name, child in module.named_children():
        if type(child) in _PLAIN:  # what stands in the row
            yield from ((name, f'{kind}…') for _, kind in _children(child))
        elif not name.endswith('act'):
            yield name, _kind(child)


def _kind(module):
    if isinstance(module, nn.Conv2d):
        kind = 'depthwise' if 1 < module.groups == module.in_channels else 'grouped' if module.groups > 1 else ''
        return f'{kind} {type(module).__name__}'.strip()
    if isinstance(module, (nn.MaxPool2d, nn.AvgPool2d)) and module.ceil_mode:
        return f'ceiling {type(module).__name__}'
    return type(module).__name__


def forms(model):
    """The forms of the package's own modules in a model, but that of the model itself."""
    return {form(m) for m in model.modules() if m is not model and type(m).__module__.startswith('cspnet_timm.')}


@functools.cache
def known_forms():
    """The forms that the networks of this file have."""
    return set().union(*(forms(timm.create_model(name, device='meta')) for name in NETWORKS))
