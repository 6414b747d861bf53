"""The tables of the documentation are what the registered models are."""
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import timm

from cspnet_timm.counting import measure
from cspnet_timm.sizes import model_sizes
from tests.zoo import NECKS, REPRESENTATIVES

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / 'docs'
spec = importlib.util.spec_from_file_location('tables', ROOT / 'benchmarks' / 'tables.py')
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)

PAGES = [page for page in sorted(DOCS.glob('*.md')) if tables.BLOCK.search(page.read_text(encoding='utf-8'))]


def test_every_model_has_a_row():
    """That the row is right is checked by ``test_models.py``, and its operations by the test behind this one."""
    wrong = sorted(set(timm.list_models('cspnet_*')) ^ set(model_sizes()))
    assert not wrong, f'{wrong} are not both registered and in data/models.csv: run python benchmarks/tables.py'


@pytest.mark.slow
def test_rows_are_right():
    # Of each structure one; that every row is of its model, but for the operations, test_models.py looks.
    rows = {name: model_sizes()[name] for name in (*REPRESENTATIVES, *NECKS)}
    wrong = [name for name, row in rows.items() if row != measure(name)]
    assert not wrong, f'run: python benchmarks/tables.py --recount ({wrong})'


def test_every_network_with_darknet_files_is_in_the_data():
    with tables.STREAMS.open(encoding='ascii') as file:
        rows = {line.partition(',')[0] for line in file} - {'model'}
    assert rows == set(tables.darknet.NETWORKS), 'run: python benchmarks/tables.py'


@pytest.mark.slow
def test_what_darknets_files_hold_is_right():
    assert tables.STREAMS.read_text(encoding='ascii') == tables.darknet.format_streams(), (
        'run: python benchmarks/tables.py')


@pytest.mark.slow
def test_only_what_changed_is_counted_again(monkeypatch):
    names = ('cspnet_nano', 'cspnet_tiny', 'cspnet_small', 'cspnet_yolov8n_pan')
    monkeypatch.setattr(tables.timm, 'list_models', lambda pattern: list(names))
    rows = {name: model_sizes()[name] for name in names[1:]}
    rows['cspnet_tiny'] = replace(rows['cspnet_tiny'], fingerprint='0' * 16)
    rows['cspnet_gone'] = replace(rows['cspnet_small'], model='cspnet_gone')
    counted = []
    monkeypatch.setattr(tables, 'measure', lambda name: counted.append(name) or measure(name))
    assert tables.update(rows) == {name: model_sizes()[name] for name in names}
    assert counted == ['cspnet_nano', 'cspnet_tiny']


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_page_is_up_to_date(page):
    text = page.read_text(encoding='utf-8')
    assert tables.render(text) == text, 'run: python benchmarks/tables.py'


def test_every_tag_is_in_the_csv():
    text = (DOCS / 'weights.csv').read_text(encoding='utf-8')
    assert text == tables.weights_csv(), 'run: python benchmarks/tables.py'


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
