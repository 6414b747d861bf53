"""Writes the tables of the documentation from the registered models, so that no number in them is typed.

A table stands in a page between ``<!-- sizes: PATTERN … -->`` or ``<!-- weights: PATTERN … -->`` or ``<!-- choice:
PATTERN … -->`` and ``<!-- end -->``; the patterns name models as ``timm.list_models`` takes them, those behind a ``-``
are left out.

    python docs/tables.py          # rewrites every page beside this file that is out of date
    python docs/tables.py --check  # only names them, and fails if there are any
"""
import argparse
import functools
import re
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Tuple

import timm

import cspnet_timm  # noqa: F401  registers the models
from cspnet_timm.counting import count_macs, count_parameters

FOLDER = Path(__file__).resolve().parent
BLOCK = re.compile(r'(<!-- (sizes|weights|choice): (.*?) -->\n).*?(<!-- end -->)', re.DOTALL)
SIZES = {size: index for index, size in enumerate(
    ('nano', 'n', 'tiny', 't', 'small', 's', 'medium', 'm', 'large', 'l', 'xlarge', 'x'))}


def _models(patterns: str) -> List[str]:
    words = patterns.split()
    return timm.list_models(
        [w for w in words if not w.startswith('-')], exclude_filters=[w[1:] for w in words if w.startswith('-')])


def _by_size(name: str) -> Tuple[str, int]:
    """Order by family and form first, then from the smallest to the largest."""
    stem, form = (name[:-4], '_cls') if name.endswith('_cls') else (name, '')
    match = re.fullmatch(r'(.*?)_?(nano|tiny|small|medium|xlarge|large|(?<=[\d_])[ntsmlx])', stem)
    return (match[1] + form, SIZES[match[2]]) if match else (name, 0)


@functools.cache
def _counts(name: str, side: int) -> Tuple[int, int, Tuple[int, ...]]:
    """Parameters, multiply-accumulates at ``side`` pixels, channels; with the classifier where it is a layer more."""
    model = timm.create_model(name, device='meta')
    if not name.endswith('_cls'):
        model.reset_classifier(0)
    channels = tuple(info['num_chs'] for info in model.feature_info)
    return count_parameters(model), count_macs(model, (3, side, side)), channels


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(header), *map(list, rows)]
    lines.insert(1, ['---'] * len(lines[0]))
    return ''.join(f'| {" | ".join(cells)} |\n' for cells in lines)


def _sizes(names: List[str]) -> str:
    rows = []
    for name in sorted(names, key=_by_size):
        params, macs, channels = _counts(name, 224)
        rows.append((f'`{name}`', ', '.join(map(str, channels)), f'{params / 1e6:.2f} M', f'{macs / 1e9:.2f}',
                     f'{_counts(name, 640)[1] / 1e9:.1f}'))
    return _table(('model', 'channels of the maps', 'parameters', 'GMACs at 224', 'GMACs at 640'), rows)


def _number(value: float) -> str:
    return f'{value:.1f}' if round(value, 1) == value else f'{value:g}'


def _figure(metrics: Dict[str, float]) -> str:
    words = dict(top1='top-1', top5='top-5', ap='AP', ap50='AP50')
    figures = ', '.join(f'{words[k]} {_number(v)}' for k, v in metrics.items() if k in words)
    return f'{figures} at {metrics["size"]:g}' if figures and 'size' in metrics else figures or '–'


def _weights(names: List[str]) -> str:
    from cspnet_timm.families._builder import WEIGHTS

    rows = []
    for name in sorted((w for w in WEIGHTS if w.partition('.')[0] in names),
                       key=lambda w: (_by_size(w.partition('.')[0]), w)):
        cfg, info = timm.get_pretrained_cfg(name), WEIGHTS[name]
        url = cfg.url or cfg.origin_url or (f'https://huggingface.co/{cfg.hf_hub_id}' if cfg.hf_hub_id else '')
        file = f'[{info.source.partition(",")[0]}]({url})'
        rows.append((f'`{name}`', info.data, _figure(info.metrics), info.metrics_source or '–',
                     info.license, file if cfg.has_weights else f'{file}, not downloaded'))
    return _table(('weights', 'trained on', 'published figure', 'published in', 'licence', 'file'), rows)


def _best(infos: List[Any], metric: str) -> str:
    """The best published figure of a model's weights, and the size of image that it is for."""
    found = [(info.metrics[metric], info.metrics['size']) for info in infos if metric in info.metrics]
    return f'{_number(max(found)[0])} at {max(found)[1]:g}' if found else '–'


def _choice(names: List[str]) -> str:
    from cspnet_timm.families._builder import WEIGHTS

    rows = []
    for name in sorted(names, key=lambda n: (_counts(n, 224)[1], n)):
        params, macs, _ = _counts(name, 224)
        infos = [info for tag, info in WEIGHTS.items() if tag.partition('.')[0] == name]
        rows.append((f'{macs / 1e9:.2f}', f'{params / 1e6:.2f} M', f'`{name}`',
                     _best(infos, 'top1'), _best(infos, 'ap'),
                     ', '.join(sorted({info.license for info in infos})) or 'no weights'))
    return _table(
        ('GMACs at 224', 'parameters', 'model', 'ImageNet top-1', 'AP of its detector', 'licence of the weights'), rows)


_MAKERS: Dict[str, Callable[[List[str]], str]] = {'sizes': _sizes, 'weights': _weights, 'choice': _choice}


def render(text: str) -> str:
    """Fill the tables of a page.

    Args:
        text: The page.

    Returns:
        The page with every table as the registered models have it.
    """
    return BLOCK.sub(lambda m: f'{m[1]}{_MAKERS[m[2]](_models(m[3]))}{m[4]}', text)


def main() -> int:
    """Rewrite or check the pages.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description='Write the tables of the documentation from the registered models.')
    parser.add_argument('--check', action='store_true', help='write nothing, fail if a page is out of date')
    check = parser.parse_args().check
    stale = 0
    for page in sorted(FOLDER.glob('*.md')):
        old = page.read_text(encoding='utf-8')
        new = render(old)
        if new != old:
            stale += 1
            print(f'{page.name}: {"out of date" if check else "rewritten"}')
            if not check:
                page.write_text(new, encoding='utf-8')
    return int(check and stale > 0)


if __name__ == '__main__':
    sys.exit(main())
