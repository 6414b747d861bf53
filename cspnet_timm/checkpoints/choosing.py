"""Which of several sets of weights in a file is taken: one rule and one table of names, for every road into a model.

A moving average of the weights is what a network is evaluated with, so that it is preferred where a file has one beside
the raw weights. Whether a set is an average follows from the names that lead to it. Two networks that learn from each
other are told by their names as well: a teacher that is like its student is its average, and what is evaluated; one
that is not is another network, which the student learns from; and the copy that contrastive methods keep beside the
network that they train is left.
"""
import re
from collections import Counter
from typing import Any, Callable, Dict, Iterable, List, Mapping, NamedTuple, Optional, Set, Tuple, TypeVar

__all__ = ['Choice', 'choose', 'clean_names', 'is_average', 'split_average']

T = TypeVar('T')

_AVERAGE = re.compile(r'(^|_)(ema|ewa|swa|avg|average|averaged|averaging|shadow|polyak)(_|$)')
# In which order names are looked under; others come after them, the one with the most tensors first.
_NAMES = ('state_dict', 'model', 'model_state_dict', 'model_state', 'params', 'module', 'net', 'network', 'weights')
_NO_WEIGHTS = re.compile(
    r'optim|^opt$|sched|scaler|callback|loops|hyper|hparam|^args$|^cfg$|config|^meta$|_rng|^rng|history|message_hub|'
    r'loss|metric|sampler|dataloader')
# Raw weights that the framework has put aside for the average, which took their usual place.
_PUT_ASIDE = ('current_model_state', 'ema_state_dict')
# What is taken of two networks in one file whose names differ in these alone, and what is not; whether the first is an
# average of the second.
_PAIRS: Tuple[Tuple[str, str, bool], ...] = (
    ('teacher', 'student', True), ('encoder_q', 'encoder_k', False), ('base_encoder', 'momentum_encoder', False),
    ('online', 'target', False), ('online', 'momentum', False), ('query_encoder', 'key_encoder', False),
)
_ALIKE = 0.75  # of the tensors of the larger one, beside heads that one of them may have alone
_MAX_DEPTH = 6
_WRAPPERS = re.compile(r'(^|\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_fpw_module)(?=\.)')
_LEADING = ('module', '_orig_mod', 'model', 'state_dict', '_module')


class Choice(NamedTuple):
    """A set of weights within a file.

    Attributes:
        part: Names that lead to it, with dots; '' for the whole file.
        value: What is there.
        average: Whether it is a moving average; None if nothing tells.
    """

    part: str
    value: Any
    average: Optional[bool]


def is_average(name: str) -> bool:
    """Whether a name is one that training scripts give a moving average of the weights."""
    return _AVERAGE.search(re.sub(r'(?<=[a-z])(?=[A-Z])', '_', name).lower()) is not None


def _put_aside(top: Mapping[Any, Any]) -> Set[str]:
    """Names under which a framework keeps the raw weights while ``state_dict`` holds their average."""
    found: Set[str] = set()
    if top.get('state_dict') is None:
        return found
    if top.get('current_model_state') is not None:  # Lightning's WeightAveraging
        found.add('current_model_state')
    other = top.get('ema_state_dict')
    entries = other if isinstance(other, Mapping) else getattr(other, 'entries', None)
    # mmengine swaps the two before it saves: its own file has these names beside them
    if isinstance(entries, Mapping) and entries and (
            'message_hub' in top or top.get('meta') is not None or 'steps' in entries):
        found.add('ema_state_dict')
    return found


def _alike(a: Iterable[Any], b: Iterable[Any]) -> bool:
    """Whether two sets of tensors have the same shapes, so that one may be a copy of the other."""
    ours, theirs = Counter(map(tuple, a)), Counter(map(tuple, b))
    return (ours & theirs).total() >= _ALIKE * max(ours.total(), theirs.total(), 1)


def choose(
        root: Any,
        children: Callable[[Any], Mapping[Any, Any]],
        count: Callable[[Any], int],
        shapes: Callable[[Any], Iterable[Any]] = lambda value: (),
) -> Optional[Choice]:
    """Find the set of weights that a file is about.

    Args:
        root: What the file holds.
        children: The values by name that lie in a value, empty for what cannot hold a set.
        count: How many weights a value directly holds by name, 0 if it is no set of weights.
        shapes: Of these weights, by which copies are known.

    Returns:
        The set; an average before the raw weights, a known name before others; None if there is none.
    """
    found: List[Tuple[Tuple[int, int, int], Choice]] = []
    aside = _put_aside(children(root))
    seen: Set[int] = set()
    pending: List[Tuple[Tuple[str, ...], Any]] = [((), root)]
    while pending:
        path, value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        size = count(value)
        if size:
            average = any(map(is_average, path)) or (bool(aside) and path == ('state_dict',))
            # Tensors at the top, beside sets under names that are known, are something else.
            first = len(_NAMES)
            if path:
                first = _NAMES.index(path[0]) if path[0] in _NAMES else len(_NAMES) + 1
            rank = (not average, 0 if average else first, -size)
            found.append((rank, Choice('.'.join(path), value, average or None)))
        if len(path) < _MAX_DEPTH:
            pending.extend(
                ((*path, name), child) for name, child in children(value).items()
                if type(name) is str and not _NO_WEIGHTS.search(name.lower()) and not (not path and name in aside)
            )
    if not found:
        return None
    choice = min(found, key=lambda item: item[0])[1]
    parts = {other.part: other for _, other in found}
    for used, kept, is_average_of in _PAIRS:
        taken, other = (parts.get(choice.part.replace(a, b)) for a, b in ((kept, used), (used, kept)))
        if taken is None or other is None or taken is other:
            continue
        if _alike(shapes(taken.value), shapes(other.value)):
            choice = taken._replace(average=is_average_of or taken.average)
        elif is_average_of:  # a larger network that the other one learns from
            choice = other
        break
    if choice.average is None and any(type(name) is str and is_average(name) for name in children(root)):
        choice = choice._replace(average=False)
    return choice


def split_average(
        shapes: Mapping[str, Iterable[int]],
        average: Optional[bool],
) -> Tuple[List[str], Optional[bool]]:
    """Choose between raw weights and an average that lie in one state dict, under prefixes such as ``model_ema.``.

    Args:
        shapes: Of the tensors, by their names.
        average: What is known of the state dict as a whole.

    Returns:
        The names to take, and whether they are an average.
    """
    names = list(shapes)
    for first, second, is_average_of in _PAIRS:
        taken = [name for name in names if first in name.rpartition('.')[0]]
        other = [name for name in names if second in name.rpartition('.')[0] and first not in name]
        if not taken or not other:
            continue
        if _alike((shapes[name] for name in taken), (shapes[name] for name in other)):
            return [name for name in names if name not in set(other)], is_average_of or average
        if is_average_of:
            return [name for name in names if name not in set(taken)], average
    inside = [name for name in names if _leads_to_average(name)]
    if not inside:
        return names, average
    if 3 * len(inside) < len(names):  # a module that is called so, not a copy of the others
        return names, average
    return inside, True


def _leads_to_average(name: str) -> bool:
    parts = name.split('.')
    for part in parts[:-1]:
        if is_average(part):
            return True
        if part not in _LEADING:
            return False
    return False


def clean_names(tensors: Mapping[str, T]) -> Dict[str, T]:
    """Remove from names what ``torch.compile``, FSDP and ``DistributedDataParallel`` put into them.

    Args:
        tensors: Anything by name.

    Returns:
        The same by the names that the module would have without its wrappers.
    """
    out: Dict[str, T] = {}
    for name, value in tensors.items():
        clean = _WRAPPERS.sub('', name).lstrip('.')
        while clean.startswith('module.'):
            clean = clean[len('module.'):]
        out[clean] = value
    return out if len(out) == len(tensors) else dict(tensors)
