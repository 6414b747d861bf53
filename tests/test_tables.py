"""The tables of the documentation are what the registered models are."""
import importlib.util
from pathlib import Path

import pytest
import timm

DOCS = Path(__file__).resolve().parent.parent / 'docs'
spec = importlib.util.spec_from_file_location('tables', DOCS / 'tables.py')
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)

PAGES = [page for page in sorted(DOCS.glob('*.md')) if tables.BLOCK.search(page.read_text(encoding='utf-8'))]


@pytest.mark.slow
@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_page_is_up_to_date(page):
    text = page.read_text(encoding='utf-8')
    assert tables.render(text) == text, f'run: python docs/{Path(tables.__file__).name}'


def test_every_detector_is_on_a_page():
    shown = '\n'.join(page.read_text(encoding='utf-8') for page in PAGES if page.name != 'choosing.md')
    for pattern in ('cspnet_rtmdet_*', 'cspnet_yolox_*', 'cspnet_ppyoloe_*', 'cspnet_yolo*'):
        for name in timm.list_models(pattern):
            assert f'| `{name}` |' in shown, name


def test_a_wrong_table_is_rewritten():
    page = 'before\n<!-- sizes: cspnet_yolox_nano -->\n| wrong |\n<!-- end -->\nbehind\n'
    rendered = tables.render(page)
    assert '| wrong |' not in rendered and '| 0.46 M |' in rendered
    assert rendered.startswith('before\n') and rendered.endswith('<!-- end -->\nbehind\n')
    assert tables.render(rendered) == rendered


def test_order():
    names = ['cspnet_yolov5x', 'cspnet_yolov5n_cls', 'cspnet_yolov5n', 'cspnet_yolov5m', 'cspnet_yolov5s']
    assert sorted(names, key=tables._by_size) == [
        'cspnet_yolov5n', 'cspnet_yolov5s', 'cspnet_yolov5m', 'cspnet_yolov5x', 'cspnet_yolov5n_cls']
