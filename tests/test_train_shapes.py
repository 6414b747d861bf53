"""timm's training pieces with a model of this package, as benchmarks/train_shapes.py puts them together."""
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

FILE = Path(__file__).parents[1] / 'benchmarks' / 'train_shapes.py'


@pytest.fixture(scope='module')
def shapes():
    spec = importlib.util.spec_from_file_location('train_shapes', FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_training_lowers_the_loss(shapes, tmp_path):
    results = shapes.main(['--images', '120', '--epochs', '3', '--output', str(tmp_path / 'results' / 'shapes')])
    assert json.loads((tmp_path / 'results' / 'shapes.json').read_text()) == results
    assert Image.open(tmp_path / 'results' / 'shapes.png').width > 500
    assert list(results) == ['cspnet_nano', 'plain counterpart']
    for result in results.values():
        losses = [point['loss'] for point in result['curve']]
        assert len(losses) == 3 and losses[-1] < losses[0]


def test_the_classes_are_drawn_as_they_are_named(shapes):
    for half, columns in (('left', slice(0, 32)), ('right', slice(32, 64))):
        covered = np.mean([
            np.asarray(shapes.draw('disc', 'rows', half, np.random.default_rng(i)), float)[:, columns].std()
            > np.asarray(shapes.draw('disc', 'rows', half, np.random.default_rng(i)), float)[:, ::-1][:, columns].std()
            for i in range(20)
        ])
        assert covered >= 0.8  # the half that is named has the figure in it
    rows = np.asarray(shapes.draw('square', 'rows', None, np.random.default_rng(0)), float)
    columns = np.asarray(shapes.draw('square', 'columns', None, np.random.default_rng(0)), float)
    assert np.abs(np.diff(rows, axis=0)).mean() > np.abs(np.diff(rows, axis=1)).mean()
    assert np.abs(np.diff(columns, axis=1)).mean() > np.abs(np.diff(columns, axis=0)).mean()


def test_the_plain_counterpart_has_the_same_widths_and_depths(shapes):
    csp, plain = timm.create_model('cspnet_nano'), shapes.plain_counterpart('cspnet_nano')
    assert csp.feature_info == plain.feature_info
    for a, b in zip(csp.levels(), plain.levels()):
        blocks = [sum(type(m).__name__ == 'DarkBlock' for m in level.modules()) for level in (a, b)]
        assert blocks[0] == blocks[1]
    assert not any(type(m).__name__ == 'CrossStage' for m in plain.modules())
    assert plain(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)
