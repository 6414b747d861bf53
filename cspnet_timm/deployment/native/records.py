"""The names that Python and C++ both know: enumerations and structures of ``cpp/structs.h``, compared on loading."""
import enum
import struct
from typing import Dict, Tuple

from .plan import ACTIVATIONS

__all__ = ['BINARY', 'BLOCK', 'EPILOGUE', 'EPILOGUE_TILES', 'FLOW', 'JOB', 'KIND', 'LAYER', 'MODE', 'PLACE', 'POOL',
           'RUN', 'STEP', 'compare', 'float_bits']

KIND = enum.IntEnum('KIND', 'CONV DEPTHWISE POOL MEAN BINARY UPSAMPLE ZEROS INPUT OUTPUT', start=0)
MODE = enum.IntEnum('MODE', 'DIRECT BAND PATCH', start=0)
FLOW = enum.IntEnum('FLOW', 'HALF BYTES FROM_HALF FROM_BYTES', start=0)
POOL = enum.IntEnum('POOL', 'MAXIMUM AVERAGE AVERAGE_PADDED', start=0)
BINARY = enum.IntEnum('BINARY', 'ACTIVATION SUM PRODUCT', start=0)
PLACE = enum.IntEnum('PLACE', 'SHARED OWN LOCAL', start=0)

LAYER = (
    'kind', 'flavour', 'in_off', 'in_ps', 'in_h', 'in_w', 'in_c', 'in_rows', 'in_place', 'in_turns',
    'in2_off', 'in2_ps', 'in2_rows', 'in2_place', 'in2_small', 'out_off', 'out_ps', 'out_h', 'out_w', 'out_c',
    'out_rows', 'out_place', 'kh', 'kw', 'stride', 'pad_h', 'pad_w', 'dil', 'act', 'act_param', 'res_mode',
    'in8', 'out8', 'in2_8', 'fill', 'in_scale', 'in_zero', 'in2_scale', 'in2_zero', 'out_inv', 'out_zero', 'weights',
    'bias', 'flow', 'mode',
    'tap_c', 'nblocks', 'blocks', 'ksteps', 'koff', 'flat', 'rows_at_once', 'planes', 'plane', 'width', 'band_ps',
    'dense', 'by_position', 'steps_at_once', 'fetch', 'index', 'is_f32', 'row_table', 'column_table')
BLOCK = ('out_off', 'out_ps', 'out_rows', 'out_place', 'nstore', 'res_off', 'res_ps', 'a_off', 'epilogue')
STEP = ('layer', 'b0', 'b1', 'y0', 'y1', 'n0', 'n1', 'apart', 'barrier')
RUN = ('from', 'count', 'weights')
JOB = ('program', 'arena', 'images', 'input', 'stride_n', 'stride_c', 'stride_h', 'stride_w', 'outputs')
EPILOGUE_TILES = ('int32:shift', 'float16:mul', 'float16:res_mul', 'float16:inv', 'float16:add')  # of 32 channels each
EPILOGUE = ('float32:mul', 'float32:res_mul', 'float32:res_add', 'float32:inv', 'float32:add')

_NAMES: Dict[str, Tuple[str, ...]] = {
    'Kind': tuple(KIND.__members__), 'Act': tuple(a.upper() for a in ACTIVATIONS), 'Mode': tuple(MODE.__members__),
    'Flow': tuple(FLOW.__members__), 'Pool': tuple(POOL.__members__), 'Binary': tuple(BINARY.__members__),
    'Place': tuple(PLACE.__members__), 'Layer': LAYER, 'Block': BLOCK, 'Step': STEP, 'Run': RUN, 'Job': JOB,
    'EpilogueTiles': EPILOGUE_TILES, 'Epilogue': EPILOGUE}


def compare(description: str) -> None:
    """Compare what the compiled engine calls things with what they are called here.

    Args:
        description: A line for each enumeration and structure: its name, and its members' in order.

    Raises:
        RuntimeError: If a name or its place differs; the message has both.
    """
    theirs = {name: tuple(members) for name, *members in (line.split() for line in description.splitlines())}
    for name in {**_NAMES, **theirs}:
        a, b = _NAMES.get(name), theirs.get(name)
        if a is None or b is None:
            raise RuntimeError(f'The native engine\'s two halves do not fit: {name} is known to one of them alone.')
        for i in range(max(len(a), len(b))):
            x, y = (names[i] if i < len(names) else 'nothing' for names in (a, b))
            if x != y:
                raise RuntimeError(f'The native engine\'s two halves do not fit: member {i} of {name} is {x} in Python '
                                   f'and {y} in C++.')


def float_bits(value: float) -> int:
    """A float32 as the integer of the same bits."""
    return struct.unpack('<i', struct.pack('<f', value))[0]
