"""The scripts of examples/, run as a user runs them."""
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow.parquet
import pytest
import timm
import torch
from PIL import Image

import cspnet_timm
from tests import foreign
from tests.hub_server import Hub
from tests.parity import load_fixture
from tests.preloaded import python
from tests.test_hub import client_environment

EXAMPLES = Path(__file__).parents[1] / 'examples'

needs_smp = pytest.mark.skipif(
    importlib.util.find_spec('segmentation_models_pytorch') is None,
    reason='segmentation_models_pytorch is not installed: pip install ".[clients]"')


def execute(example, folder, *arguments, **environment):
    packages = [str(Path(cspnet_timm.__file__).parents[1]), os.environ.get('PYTHONPATH', '')]
    return subprocess.run(
        [python(), str(EXAMPLES / f'{example}.py'), *map(str, arguments)], cwd=folder, capture_output=True,
        text=True, timeout=1200, env={**os.environ, 'PYTHONPATH': os.pathsep.join(packages), **environment})


def run(*args, **kwargs):
    done = execute(*args, **kwargs)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope='module')
def examples():
    """The example's modules, importable by their names as they are for each other."""
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module
    sys.path.remove(str(EXAMPLES))


# Drawing

def test_scenes(examples):
    scenes = examples('shapes').Scenes(20, size=64, seed=3)
    again, other = examples('shapes').Scenes(2, size=64, seed=3), examples('shapes').Scenes(2, size=64, seed=4)
    assert torch.equal(scenes[1][0], again[1][0]) and not torch.equal(scenes[1][0], other[1][0])
    for image, target in (scenes[i] for i in range(20)):
        assert image.shape == (3, 64, 64) and 0 <= image.min() and image.max() <= 1
        assert len(target['boxes']) == len(target['labels']) >= 1
        covered = torch.zeros(64, 64, dtype=torch.bool)
        for (left, top, right, bottom), label in zip(target['boxes'].int().tolist(), target['labels']):
            inside = target['mask'][top:bottom, left:right] == label
            assert all(inside.any(axis)[[0, -1]].all() for axis in (0, 1))  # the box touches the shape on four sides
            covered[top:bottom, left:right] = True
        assert (target['mask'][~covered] == 0).all()


def test_average_precision(examples):
    average_precision = examples('detect').average_precision
    boxes = torch.tensor([[0., 0., 10., 10.], [20., 20., 30., 30.], [40., 40., 50., 50.]])
    targets = [{'boxes': boxes[:2], 'labels': torch.tensor([1, 1])}, {'boxes': boxes[2:], 'labels': torch.tensor([2])}]

    def found(*images):
        return [{'boxes': torch.tensor([p[0] for p in image]).reshape(-1, 4),
                 'labels': torch.tensor([p[1] for p in image], dtype=torch.long),
                 'scores': torch.tensor([p[2] for p in image])} for image in images]

    a, b, c = boxes.tolist()
    assert average_precision(found([(a, 1, 0.9), (b, 1, 0.8)], [(c, 2, 0.1)]), targets, 0.5) == 1
    assert average_precision(found([], []), targets, 0.5) == 0
    assert average_precision(found([(a, 2, 0.9), (b, 2, 0.8)], [(c, 1, 0.9)]), targets, 0.5) == 0
    # One of two, found twice: precision 1 up to the recall 0.5, at 51 of 101 points, and the other class entirely.
    once = average_precision(found([(a, 1, 0.9), (a, 1, 0.8)], [(c, 2, 0.9)]), targets, 0.5)
    assert once == pytest.approx((51 / 101 + 1) / 2)
    # A wrong box before the right one, in another image: precision 1/2 at every recall up to 0.5.
    late = average_precision(found([(a, 1, 0.8)], [(a, 1, 0.9), (c, 2, 0.9)]), targets, 0.5)
    assert late == pytest.approx((51 / 101 / 2 + 1) / 2)
    # Of boxes that overlap by 0.6, what counts is the threshold.
    shifted = found([([0., 0., 10., 6.], 1, 0.9), (b, 1, 0.8)], [(c, 2, 0.9)])
    assert average_precision(shifted, targets, 0.55) == 1
    assert average_precision(shifted, targets, 0.65) == pytest.approx((51 / 101 / 2 + 1) / 2)


# Fine-tuning

def draw_two_classes(root, train=60, validation=20):
    """Red and blue squares."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (('train', train), ('validation', validation)):
        for kind, colour in (('blue', (30, 60, 200)), ('red', (200, 60, 30))):
            (root / split / kind).mkdir(parents=True)
            for i in range(count):
                image = torch.randint(0, 60, (64, 64, 3), generator=generator, dtype=torch.uint8)
                x, y = torch.randint(0, 40, (2,), generator=generator).tolist()
                image[y:y + 24, x:x + 24] = torch.tensor(colour, dtype=torch.uint8)
                Image.fromarray(image.numpy()).save(root / split / kind / f'{i}.png')


@pytest.mark.slow
def test_finetune(tmp_path):
    """On shapes first, then on a folder of images, from what the first has left."""
    said = run('finetune', tmp_path, '--images', 80, '--epochs', 1, '--output', 'first')
    assert re.search(r'cspnet_nano: \d+\.\d % of 20 held-out images, 10 classes', said)
    first = timm.create_model(f'local-dir:{tmp_path / "first"}', pretrained=True)
    assert first.num_classes == 10 and first.pretrained_cfg['label_names'][0] == '0_disc_rows_left'
    assert first.pretrained_cfg['input_size'] == (3, 64, 64)
    assert 'license: other' in (tmp_path / 'first' / 'README.md').read_text()

    draw_two_classes(tmp_path / 'images')
    said = run('finetune', tmp_path, 'images', '--model', 'local-dir:first', '--pretrained', '--img-size', 64,
               '--epochs', 8, '--batch-size', 8, '--layer-decay', 0.7, '--lr', 0.005, '--output', 'second')
    assert float(re.search(r'first: (\d+\.\d) % of 40 held-out images, 2 classes', said)[1]) > 90
    second = timm.create_model(f'local-dir:{tmp_path / "second"}', pretrained=True)
    assert second.num_classes == 2 and second.pretrained_cfg['label_names'] == ['blue', 'red']
    # With layer decay, the stem has moved less than the last level has.
    moved = [(getattr(second, level).state_dict()[key] - value).norm() / value.norm()
             for level in ('stem', 'layer4') for key, value in getattr(first, level).state_dict().items()
             if key.endswith('conv.weight')]
    assert 0 < moved[0] < moved[-1]

    again = execute('finetune', tmp_path, '--output', 'second')
    assert again.returncode == 2 and 'second is there already' in again.stderr


@pytest.mark.parametrize('count', [2, 20])
def test_finetune_on_few_images(examples, tmp_path, capsys, count):
    draw_two_classes(tmp_path / 'images', count // 2, 1)
    examples('finetune').main([
        str(tmp_path / 'images'), '--img-size', '64', '--epochs', '1', '--output', str(tmp_path / 'tuned')])
    assert 'of 2 held-out images, 2 classes' in capsys.readouterr().out


# Detection and segmentation

@pytest.mark.slow
def test_detect(tmp_path):
    said = run('detect', tmp_path, '--images', 200, '--epochs', 6)  # more of both reach what the page says
    assert float(re.search(r'mAP (\d\.\d+), at IoU 0.5 \d\.\d+, on 50 held-out images', said)[1]) > 0.1
    assert Image.open(tmp_path / 'detect.png').size == (4 * (3 * 96 + 4) + 4, 2 * (3 * 96 + 4) + 4)
    assert [path.name for path in tmp_path.iterdir()] == ['detect.png']


@pytest.mark.slow
@pytest.mark.parametrize('example', ['detect', pytest.param('segment', marks=needs_smp)])
@pytest.mark.parametrize('name', ['cspnet_yolov8n', 'cspnet_yolov8n_pan'])
def test_with_a_neck_or_without_it(example, name, examples, tmp_path, capsys):
    info, state_dict, *_ = load_fixture('neck_yolov8n')
    file = foreign.write('yolov8n', tmp_path / 'yolov8n.pt', state_dict, info)
    image = tmp_path / 'found.png'
    module = examples(example)
    arguments = ['--model', name, '--images', '8', '--epochs', '1', '--batch-size', '4', '--size', '64', '--output',
                 str(image)]
    module.main([*arguments, '--weights', str(file)])
    assert f'{name}: m' in capsys.readouterr().out and image.exists()


def test_detect_with_frozen_batch_norm(examples, tmp_path, capsys):
    detect = examples('detect')
    image = tmp_path / 'new' / 'found.png'
    detect.main(['--freeze-bn', '--images', '16', '--epochs', '1', '--batch-size', '4', '--size', '64',
                 '--output', str(image)])
    assert re.search(r'mAP \d\.\d+, .* on 4 held-out images', capsys.readouterr().out)
    assert Image.open(image).size == (4 * (3 * 64 + 4) + 4, 3 * 64 + 8)
    model = detect.create_detector('cspnet_nano', 64, norm_layer='frozenbatchnorm2d')
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())


@needs_smp
@pytest.mark.slow
def test_segment(tmp_path):
    said = run('segment', tmp_path, '--size', 64, '--images', 200, '--epochs', 9)  # more reach what the page says
    assert float(re.search(r'mean IoU (\d\.\d+) on 50 held-out images', said)[1]) > 0.3  # all ground: 0.25
    assert Image.open(tmp_path / 'segment.png').size == (4 * (3 * 64 + 4) + 4, 2 * (3 * 64 + 4) + 4)
    assert [path.name for path in tmp_path.iterdir()] == ['segment.png']


@pytest.mark.slow
def test_segment_names_the_extra_that_is_missing(tmp_path):
    (tmp_path / 'segmentation_models_pytorch.py').write_text('raise ImportError("as if it were not installed")')
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = execute('segment', tmp_path, PYTHONPATH=path)
    assert done.returncode == 1 and 'pip install segmentation-models-pytorch' in done.stderr and not done.stdout
    assert 'usage: segment.py' in execute('segment', tmp_path, '--help', PYTHONPATH=path).stdout


# Vectors

def vectors(folder):
    table = pyarrow.parquet.read_table(folder)
    return {key: (row3, row4) for key, row3, row4 in zip(*(table[c].to_pylist() for c in ('key', 'layer3', 'layer4')))}


@pytest.fixture
def eight_images(tmp_path):
    """Images in two folders, one of them damaged, and the same in two tar files."""
    draw_two_classes(tmp_path / 'images', 2, 2)
    (tmp_path / 'images' / 'train' / 'broken.jpg').write_bytes(b'no image')
    for i, split in enumerate(('train', 'validation')):
        with tarfile.open(tmp_path / f'{i:03d}.tar', 'w') as tar:
            for path in sorted((tmp_path / 'images' / split).rglob('*.png')):
                tar.add(path, f'{split}-{path.parent.name}-{path.name}')
    return tmp_path


def test_embed(examples, eight_images, capsys):
    embed, out = examples('embed'), eight_images / 'vectors'
    arguments = [str(eight_images / 'images'), '--model', 'cspnet_nano', '--batch-size', '3', '--rows', '3', '--out']
    embed.main([*arguments, str(out)])
    said = capsys.readouterr()
    assert '8 images -> ' in said.out and 'train/broken.jpg: passed over' in said.err
    found = vectors(out)
    assert set(found) == {f'{s}/{c}/{i}.png' for s in ('train', 'validation') for c in ('blue', 'red') for i in (0, 1)}
    # One vector is the mean of the level's map of that image, whatever was in the batch with it.
    embedder = embed.Embedder(dict(model='cspnet_nano', pretrained=False, levels=[3, 4], device='cpu'))
    with Image.open(eight_images / 'images' / 'train' / 'red' / '1.png') as image, torch.no_grad():
        maps = embedder.model(embedder.transform(image.convert('RGB'))[None])
    for vector, level in zip(found['train/red/1.png'], maps):
        torch.testing.assert_close(torch.tensor(vector), level.mean((2, 3))[0])
    # What is missing is done, and what is there is not done again.
    first, *others = sorted(out.glob('*.parquet'))
    others[0].unlink()
    before = first.stat().st_mtime_ns
    embed.main([*arguments, str(out)])
    assert '5 images are done already' in (said := capsys.readouterr().out) and '3 images -> ' in said
    again = vectors(out)
    assert again.keys() == found.keys() and first.stat().st_mtime_ns == before
    torch.testing.assert_close(torch.tensor([v[1] for v in again.values()]),
                               torch.tensor([found[key][1] for key in again]))
    with pytest.raises(SystemExit, match='was begun with'):
        embed.main([*arguments, str(out), '--levels', '2'])


def test_embed_a_webdataset(examples, eight_images):
    out = eight_images / 'vectors'
    examples('embed').main([str(eight_images / '{000..001}.tar'), '--model', 'cspnet_nano', '--out', str(out)])
    assert set(vectors(out)) == {
        f'{s}-{c}-{i}' for s in ('train', 'validation') for c in ('blue', 'red') for i in (0, 1)}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('ray') is None, reason='ray is not installed: pip install ".[clients]"')
def test_embed_on_ray(eight_images):
    arguments = ['images', '--model', 'cspnet_nano', '--batch-size', 3]
    run('embed', eight_images, *arguments, '--out', 'here')
    assert '8 images -> there' in run('embed', eight_images, *arguments, '--ray', 1, '--rows', 5, '--out', 'there')
    here, there = vectors(eight_images / 'here'), vectors(eight_images / 'there')
    assert here.keys() == there.keys()
    for key, pair in here.items():
        for a, b in zip(pair, there[key]):
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b))


# Weights of another framework, and the Hub

@pytest.mark.slow
def test_convert_and_push(tmp_path):
    info, state_dict, _, _ = load_fixture('yolox_nano')
    foreign.write('yolox_nano', tmp_path / 'yolox_nano.pth', state_dict, info)
    with Hub() as hub:
        said = run('convert_and_push', tmp_path, 'yolox_nano.pth', 'owner/shapes', '--images', 80, '--epochs', 1,
                   **client_environment(hub, tmp_path / 'home'))
        files = hub.repos['owner/shapes'].files()
    assert 'converted to cspnet_yolox_nano' in said and 'licence apache-2.0' in said
    assert re.search(r'\d+\.\d % of 20 held-out images, 10 classes', said)
    assert re.search(r'pulled: all \d{3} tensors are equal', said)
    assert set(files) >= {'model.safetensors', 'config.json', 'README.md'}
    card = files['README.md'].decode()
    assert 'license: apache-2.0' in card and 'yolox_nano.pth' in card and '0_disc_rows_left' in card
