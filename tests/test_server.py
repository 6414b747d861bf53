"""benchmarks/server.py: what it writes; and that a deployed network neither stalls nor grows."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.preloaded import python

BENCHMARK = Path(__file__).parents[1] / 'benchmarks' / 'server.py'


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='resident memory is read as Linux tells it')
def test_a_server_with_dynamic_batches(tmp_path):
    subprocess.run([
        python(), str(BENCHMARK), '--out', str(tmp_path), '--size', '64', '--calls', '200', '--batch', '4',
        '--most', '16'], check=True, timeout=1200)
    report = json.loads((tmp_path / 'server.json').read_text())
    assert {'eager'} <= {r['backend'] for r in report['results']}
    for result in report['results']:
        assert result['per_image'] > 0 and len(result['memory']) == 11
        assert result['memory'][-1] - result['memory'][3] < 48, result  # all batches have been by then
    assert '| eager |' in (tmp_path / 'server.md').read_text()
