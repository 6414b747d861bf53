"""What each part of the package may import."""
import ast
import re
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / 'cspnet_timm'

# Each layer may import the ones above it in this list, and nothing below.
LAYERS = ['layers', 'blocks', 'cross_stage', 'backbone']
ALLOWED = {name: set(LAYERS[:i]) for i, name in enumerate(LAYERS)}
ALLOWED['neck'] = {'layers', 'blocks', 'cross_stage'}
LAYERS.append('neck')
ALLOWED['checkpoints'] = set()  # readers know modules and containers, and no family
ALLOWED['sources'] = set()
ALLOWED['naming'] = {'checkpoints', 'sizes'}
ALLOWED['fitting'] = {'checkpoints', 'naming', 'sizes'}
ALLOWED['backbone'] |= {'fitting', 'naming', 'shapes'}
ALLOWED['extractors'] = {'backbone'}
ALLOWED['loading'] = {'backbone', 'checkpoints', 'extractors', 'fitting', 'naming', 'sizes'}
ALLOWED['families'] = {*LAYERS, 'checkpoints', 'extractors', 'fitting', 'loading', 'naming', 'sources'}
ALLOWED['deployment'] = {*LAYERS, 'files'}  # likewise
ALLOWED['autoload'] = ALLOWED['files'] = ALLOWED['shapes'] = set()
ALLOWED['sizes'] = ALLOWED['feature_image'] = set()
ALLOWED['counting'] = {'shapes', 'sizes'}

RUN_TIME = {'torch', 'timm', 'huggingface_hub', 'safetensors'}
BROUGHT = {'numpy', 'PIL', 'torchvision'}  # by these four


def _imports(path):
    """(module, whether it is at the top level) of every import, as absolute names."""
    tree = ast.parse(path.read_text())
    package = path.relative_to(PACKAGE.parent).with_suffix('').parts
    parents = package if path.name == '__init__.py' else package[:-1]
    parents = parents[:-1] if path.name == '__init__.py' else parents
    top = set()
    for node in tree.body:
        top.update(ast.walk(node) if isinstance(node, (ast.Import, ast.ImportFrom)) else ())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node in top
        elif isinstance(node, ast.ImportFrom):
            base = list(parents[:len(parents) - node.level + 1]) if node.level else []
            module = '.'.join([*base, *filter(None, [node.module])])
            if module == 'cspnet_timm':
                for alias in node.names:
                    yield f'{module}.{alias.name}', node in top
            else:
                yield module, node in top


def _files(part):
    file = PACKAGE / f'{part}.py'
    return [file] if file.exists() else sorted((PACKAGE / part).rglob('*.py'))


@pytest.mark.parametrize('part', ALLOWED)
def test_direction(part):
    for path in _files(part):
        for module, _ in _imports(path):
            if module.startswith('cspnet_timm.'):
                other = module.split('.')[1]
                assert other == part or other in ALLOWED[part], f'{path.name} imports {module}'


def test_outside():
    for path in PACKAGE.rglob('*.py'):
        for module, at_top in _imports(path):
            name = module.split('.')[0]
            if name not in sys.stdlib_module_names and name != 'cspnet_timm' and name not in RUN_TIME | BROUGHT:
                assert not at_top, f'{path.name} imports {module} of an extra when it is imported itself'


def test_the_hook_needs_the_standard_library_alone():
    for path in (PACKAGE / 'autoload.py', PACKAGE / '__init__.py'):
        for module, at_top in _imports(path):
            name = module.split('.')[0]
            assert not at_top or name in sys.stdlib_module_names or module.startswith('cspnet_timm.autoload'), module


def test_no_family_is_known_below():
    for part in (*LAYERS, 'checkpoints', 'deployment'):
        for path in _files(part):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    assert not node.value.startswith('cspnet_') or node.value == 'cspnet_timm', f'{path}: {node.value}'


def test_the_page_of_the_tests_names_every_file():
    page = (PACKAGE.parent / 'tests' / 'README.md').read_text()
    files = {path.name for path in Path(__file__).parent.glob('test_*.py')}
    files -= {f'test_{path.name}' for path in (PACKAGE / 'families').glob('*.py')}  # which one line speaks of
    assert not files.difference(re.findall(r'test_\w+\.py', page)), 'put them into tests/README.md'
