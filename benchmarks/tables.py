"""Writes the package's table of sizes, and the tables of the documentation, so that no number in them is typed.

The table of sizes is ``cspnet_timm/data/models.csv``, a row for each registered model. Run this after adding or
changing a model. It counts the networks that are new or whose tensors have changed, a third of a second each; a change
that no tensor shows, of a stride for instance, takes ``--recount``.

A table stands in a page between ``<!-- KIND: PATTERN … -->`` and ``<!-- end -->``. The kind is ``sizes``, ``weights``,
``choice``, ``inputs``, ``licenses``, ``tags`` or ``necks``; the patterns name models as ``timm.list_models`` takes
them, those behind ``-`` are left out. Networks with a neck are in the tables of necks alone. ``docs/weights.csv`` has a
row for each tag of the others, with all that is known of it, and ``cspnet_timm/data/darknet.csv`` lists what
Darknet's files of each network hold, by which one is recognised.

    python benchmarks/tables.py            # rewrites the table of sizes and every page in docs/ that is out of date
    python benchmarks/tables.py --recount  # as well, after counting every network again
    python benchmarks/tables.py --check    # only names what is out of date, and fails if there is any
"""
import argparse
import csv
import io
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Mapping, Tuple
from urllib.parse import urlsplit

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import get_arch_pretrained_cfgs, split_model_name_tag

import cspnet_timm  # noqa: F401  registers the models
from cspnet_timm.checkpoints import darknet
from cspnet_timm.counting import count_parameters, measure
from cspnet_timm.sizes import ModelSize, fingerprint, format_rows, model_sizes

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / 'cspnet_timm' / 'data' / 'models.csv'
STREAMS = DATA.with_name('darknet.csv')
WEIGHTS_CSV = ROOT / 'docs' / 'weights.csv'
TABLE: Dict[str, ModelSize] = dict(model_sizes()) if DATA.exists() else {}
BLOCK = re.compile(
    r'(<!-- (sizes|weights|choice|inputs|licenses|tags|necks): (.*?) -->\n).*?(<!-- end -->)', re.DOTALL)
SIZES = {size: index for index, size in enumerate(
    ('nano', 'n', 'tiny', 't', 'small', 's', 'medium', 'm', 'large', 'l', 'xlarge', 'x'))}


def _models(patterns: str, necks: bool = False) -> List[str]:
    words = patterns.split()
    names = timm.list_models(
        [w for w in words if not w.startswith('-')], exclude_filters=[w[1:] for w in words if w.startswith('-')])
    return [name for name in names if name.endswith('_pan') == necks]


def _by_size(name: str) -> Tuple[str, int]:
    """Order by family and form first, then from the smallest to the largest."""
    stem, form = (name[:-4], name[-4:]) if name.endswith(('_cls', '_pan')) else (name, '')
    match = re.fullmatch(r'(.*?)_?(nano|tiny|small|medium|xlarge|large|(?<=[\d_])[ntsmlx])', stem)
    return (match[1] + form, SIZES[match[2]]) if match else (name, 0)


def _size(name: str) -> ModelSize:
    return TABLE[name] if name in TABLE else measure(name)


def update(rows: Mapping[str, ModelSize], recount: bool = False) -> Dict[str, ModelSize]:
    """Bring the table of sizes up to date. Networks whose tensors are as they were are not counted again.

    Args:
        rows: The table as it is.
        recount: Count every network.

    Returns:
        A row for each registered model.
    """
    new = {}
    for name in timm.list_models('cspnet_*'):
        row = rows.get(name)
        if row is not None and not recount:
            model = timm.create_model(name, device='meta')
            if (fingerprint(model.state_dict()), count_parameters(model)) == (row.fingerprint, row.parameters):
                new[name] = row
                continue
        new[name] = measure(name)
    return new


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(header), *map(list, rows)]
    lines.insert(1, ['---'] * len(lines[0]))
    return ''.join(f'| {" | ".join(cells)} |\n' for cells in lines)


def _sizes(names: List[str]) -> str:
    rows = []
    for name in sorted(names, key=_by_size):
        size = _size(name)
        rows.append((f'`{name}`', ', '.join(map(str, size.channels)), f'{size.backbone_parameters / 1e6:.2f} M',
                     f'{size.macs_224 / 1e9:.2f}', f'{size.macs_640 / 1e9:.1f}'))
    return _table(('model', 'channels of the maps', 'parameters', 'GMACs at 224', 'GMACs at 640'), rows)


def _number(value: float) -> str:
    return f'{value:.1f}' if round(value, 1) == value else f'{value:g}'


def _figure(metrics: Dict[str, float]) -> str:
    words = dict(top1='top-1', top5='top-5', ap='AP', ap50='AP50', mask_ap='mask AP', keypoint_ap='keypoint AP',
                 wholebody_ap='whole-body AP', pck='PCK', nme='NME')
    figures = ', '.join(f'{words[k]} {_number(v)}' for k, v in metrics.items() if k in words)
    return f'{figures} at {metrics["size"]:g}' if figures and 'size' in metrics else figures or '–'


def _weights(names: List[str]) -> str:
    from cspnet_timm.families._builder import WEIGHTS

    rows = []
    for name in sorted((w for w in WEIGHTS if w.partition('.')[0] in names),
                       key=lambda w: (_by_size(w.partition('.')[0]), w)):
        info = WEIGHTS[name]
        file = f'[{info.source.partition(",")[0]}]({info.sources[0].link})'
        rows.append((f'`{name}`', info.data, _figure(info.metrics), info.metrics_source or '–',
                     f'[{info.terms.label}]({info.terms.link})',
                     file if info.downloads else f'{file}, not downloaded'))
    return _table(('weights', 'trained on', 'published figure', 'published in', 'licence', 'file'), rows)


def _best(infos: List[Any], metric: str) -> str:
    """The best published figure of a model's weights, and the size of image that it is for."""
    found = [(info.metrics[metric], info.metrics['size']) for info in infos
             if metric in info.metrics and (metric != 'ap' or info.data == 'COCO')]
    return f'{_number(max(found)[0])} at {max(found)[1]:g}' if found else '–'


def _choice(names: List[str]) -> str:
    from cspnet_timm.families._builder import WEIGHTS

    rows = []
    for name in sorted(names, key=lambda n: (_size(n).macs_224, n)):
        size = _size(name)
        infos = [info for tag, info in WEIGHTS.items() if tag.partition('.')[0] == name]
        rows.append((f'{size.macs_224 / 1e9:.2f}', f'{size.backbone_parameters / 1e6:.2f} M', f'`{name}`',
                     _best(infos, 'top1'), _best(infos, 'ap'),
                     ', '.join(sorted({info.terms.label for info in infos})) or 'no weights'))
    return _table(
        ('GMACs at 224', 'parameters', 'model', 'ImageNet top-1', 'AP of its detector', 'licence of the weights'), rows)


def _pixels(mean: Tuple[float, ...], std: Tuple[float, ...]) -> str:
    """What becomes of RGB images from 0 to 1."""
    if mean == (0., 0., 0.):
        return 'as they are' if std == (1., 1., 1.) else f'times {round(1 / std[0])}'
    if mean == IMAGENET_DEFAULT_MEAN and std == IMAGENET_DEFAULT_STD:
        return 'ImageNet\'s mean and deviation'
    return f'mean {mean[0]:g}, deviation {std[0]:g}'


def _inputs(names: List[str]) -> str:
    """One row for all weights of a family that want their images alike."""
    rows: Dict[Tuple[str, ...], Dict[str, List[str]]] = {}
    crops = {'center': 'the middle', 'squash': 'stretched to it', 'border': 'whole, padded'}
    for name in sorted(names, key=_by_size):
        for full_name, cfg in get_arch_pretrained_cfgs(name).items():
            what = (_pixels(tuple(cfg.mean), tuple(cfg.std)), crops[cfg.crop_mode], cfg.interpolation)
            row = rows.setdefault((_size(name).module, *what), {'models': [], 'tags': [], 'sizes': []})
            row['models'].append(f'`{name}`')
            row['tags'].append(f'`{split_model_name_tag(full_name)[1]}`')
            row['sizes'].append('×'.join(map(str, dict.fromkeys(cfg.input_size[1:]))))
    cells = []
    for (_, pixels, crop, interpolation), row in rows.items():
        models, tags, sizes = (list(dict.fromkeys(row[key])) for key in ('models', 'tags', 'sizes'))
        tags = [tag for tag in tags if tag != '`untrained`']
        if tags:
            first = ', '.join(models) if len(models) < 3 else f'{models[0]} … {models[-1]}'
            cells.append((first, ', '.join(tags), pixels, ', '.join(sizes), crop, interpolation))
    return _table(('models', 'weights', 'RGB from 0 to 1', 'size', 'what of the image', 'interpolation'), cells)


def _tagged(names: List[str]) -> List[str]:
    """Names of weights, by family and size."""
    from cspnet_timm.families import WEIGHTS

    return sorted((w for w in WEIGHTS if w.partition('.')[0] in names),
                  key=lambda w: (_size(w.partition('.')[0]).module, _by_size(w.partition('.')[0]), w))


def _licenses(names: List[str]) -> str:
    """One row for each statement of a licence."""
    from cspnet_timm.families import WEIGHTS

    counts = Counter(WEIGHTS[name].terms for name in _tagged(names))
    rows = [(f'[{terms.label}]({terms.link})', terms.stated_by, str(count)) for terms, count in counts.items()]
    return _table(('licence', 'stated by', 'sets of weights'), rows)


def _tags(names: List[str]) -> str:
    """One row for each set of weights."""
    from cspnet_timm.families import WEIGHTS

    rows = []
    for name in _tagged(names):
        info, (model, _, tag) = WEIGHTS[name], name.partition('.')
        size = '×'.join(map(str, dict.fromkeys(timm.get_pretrained_cfg(name).input_size[1:])))
        places = ', '.join(f'[{urlsplit(s.link).netloc}]({s.link})' for s in info.sources)
        rows.append((f'`{model}`', f'`{tag}`', info.data, info.task, _figure(info.metrics), size,
                     f'[{info.terms.label}]({info.terms.link})', info.terms.stated_by,
                     places if info.downloads else f'{places}, by hand'))
    return _table(('model', 'tag', 'data', 'task', 'figure', 'size', 'licence', 'who says so', 'source'), rows)


def weights_csv() -> str:
    """All that is known of every set of weights, as comma-separated values."""
    from cspnet_timm.families import WEIGHTS

    names = _tagged(_models('cspnet_*'))
    metrics = list(dict.fromkeys(key for name in names for key in WEIGHTS[name].metrics if key != 'size'))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(['model', 'tag', 'data', 'task', *metrics, 'measured_at', 'published_in', 'input_size', 'license',
                     'license_name', 'license_stated_by', 'license_link', 'publisher', 'file', 'sha256', 'downloaded',
                     'sources'])
    for name in names:
        info, (model, _, tag) = WEIGHTS[name], name.partition('.')
        size = 'x'.join(map(str, timm.get_pretrained_cfg(name).input_size[1:]))
        writer.writerow([
            model, tag, info.data, info.task, *(info.metrics.get(key, '') for key in metrics),
            info.metrics.get('size', ''), info.metrics_source, size, info.license, info.terms.name,
            info.terms.stated_by, info.terms.link, info.source, info.sources[-1].filename, info.sources[-1].sha256,
            'yes' if info.downloads else 'no', ' '.join(source.link for source in info.sources)])
    return text.getvalue()


def _necks(names: List[str]) -> str:
    from cspnet_timm.families import WEIGHTS

    rows = []
    for name in sorted(names, key=_by_size):
        size, plain = _size(name), _size(name.removesuffix('_pan'))
        infos = [info for tag, info in WEIGHTS.items() if tag.partition('.')[0] == name]
        channels = [c for c, reduction in zip(size.channels, size.reductions) if reduction >= 8]
        rows.append((
            f'`{name}`', ', '.join(map(str, channels)),
            f'{(size.backbone_parameters - plain.backbone_parameters) / 1e6:.2f} M',
            f'{(size.macs_640 - plain.macs_640) / 1e9:.2f}', f'{size.backbone_parameters / 1e6:.2f} M',
            f'{size.macs_640 / 1e9:.1f}', _best(infos, 'ap'), ', '.join(sorted({info.license for info in infos}))))
    return _table(
        ('model', 'channels from stride 8', 'parameters of the neck', 'its GMACs at 640', 'parameters of both',
         'GMACs of both', 'AP of the detector', 'licence of the weights'), rows)


_MAKERS: Dict[str, Callable[[List[str]], str]] = {
    'sizes': _sizes, 'weights': _weights, 'choice': _choice, 'inputs': _inputs, 'licenses': _licenses, 'tags': _tags,
    'necks': _necks}


def render(text: str) -> str:
    """Fill the tables of a page.

    Args:
        text: The page.

    Returns:
        The page with every table as the registered models have it.
    """
    return BLOCK.sub(
        lambda m: f'{m[1]}{_MAKERS[m[2]](_models(m[3], necks=m[2] == "necks"))}{m[4]}', text)


def main() -> int:
    """Rewrite or check the table and the pages.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description='Write the table of sizes and those of the documentation.')
    parser.add_argument('--check', action='store_true', help='write nothing, fail if anything is out of date')
    parser.add_argument('--recount', action='store_true', help='count every network, not only new and changed ones')
    args = parser.parse_args()
    TABLE.update(new := update(TABLE, args.recount))
    stale = 0
    files = (
        (DATA, lambda _: format_rows(new.values())),
        (STREAMS, lambda _: darknet.format_streams()),
        (WEIGHTS_CSV, lambda _: weights_csv()),
    )
    for path, render_file in (*files, *((p, render) for p in _pages())):
        old = path.read_text(encoding='utf-8') if path.exists() else ''
        text = render_file(old)
        if text != old:
            stale += 1
            print(f'{path.name}: {"out of date" if args.check else "rewritten"}')
            if not args.check:
                path.write_text(text, encoding='utf-8')
    return int(args.check and stale > 0)


def _pages() -> List[Path]:
    return sorted((ROOT / 'docs').glob('*.md'))


if __name__ == '__main__':
    sys.exit(main())
