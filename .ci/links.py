"""Asks every host for every file of every tag, and tells which links are dead, have moved, or lead to another file.

For a job that runs once a week or so; nothing is downloaded. What a host says of a file's size and version is kept from
one run to the next in a file, since few publishers state a hash:

    python .ci/links.py --known links.json   # exit code 1 if a link is dead or its file has changed
"""
import argparse
import json
import sys
import time
import urllib.error
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional
from urllib.parse import urljoin

from cspnet_timm import register
from cspnet_timm.sources import Source, describe_failure, open_url

REDIRECTS = {301: True, 302: False, 303: False, 307: False, 308: True}  # whether for good
MAX_REDIRECTS = 8


class Answer(NamedTuple):
    """What became of a link: ``'ok'``, ``'dead'``, ``'moved'`` or ``'changed'``."""

    state: str
    detail: str
    seen: Dict[str, Any]  # size and tag of the file, for the next run


def _ask(url: str) -> Any:
    try:
        return open_url(url, 'HEAD', follow=False)
    except urllib.error.HTTPError as error:
        if error.code not in (403, 405, 501):
            raise
    return open_url(url, headers={'Range': 'bytes=0-0'}, follow=False)  # there are hosts that refuse HEAD


def check_link(source: Source, known: Optional[Dict[str, Any]] = None) -> Answer:
    """Ask for a file, without downloading it.

    Args:
        source: The file and what is known of it.
        known: What an earlier run has seen.

    Returns:
        The answer.
    """
    url, moved = source.link, ''
    linked: Dict[str, str] = {}
    for _ in range(MAX_REDIRECTS):
        try:
            with _ask(url) as response:
                headers = response.headers
            break
        except urllib.error.HTTPError as error:
            target = error.headers.get('Location')
            if error.code not in REDIRECTS or not target:
                return Answer('dead', describe_failure(error), {})
            if error.headers.get('X-Linked-Size'):  # the Hub, of what its storage has
                linked = {'size': error.headers['X-Linked-Size'], 'tag': error.headers.get('X-Linked-Etag', '')}
            url = urljoin(url, target)
            if REDIRECTS[error.code]:
                moved = url
        except Exception as error:
            return Answer('dead', describe_failure(error), {})
    else:
        return Answer('dead', f'redirects {MAX_REDIRECTS} times', {})
    page = headers.get('Content-Type', '').startswith('text/html')
    if page and not source.manual:
        return Answer('dead', f'a page for a browser: {url}', {})
    length = (headers.get('Content-Range') or headers.get('Content-Length') or '').rpartition('/')[2]
    size = linked.get('size', length)
    tag = (linked.get('tag') or headers.get('ETag') or '').strip('"')
    seen = {} if page else {'size': int(size) if size.isdigit() else 0, 'tag': '' if tag.startswith('W/') else tag}
    known = known or {}
    for what, before, now in (
            ('size', source.size, seen.get('size')),
            ('size', known.get('size'), seen.get('size')),
            ('version', known.get('tag'), seen.get('tag')),
            ('SHA-256', source.sha256, tag[:len(source.sha256)] if source.repo_id and len(tag) == 64 else ''),
    ):
        if before and now and before != now:
            return Answer('changed', f'its {what} is {now} and not {before}', seen)
    if moved:
        return Answer('moved', f'for good, to {moved}', seen)
    return Answer('ok', '', seen)


def main() -> int:
    """Check every link.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(description='Check every link of every tag.')
    parser.add_argument('--known', type=Path, metavar='FILE', help='what earlier runs have seen; kept up to date')
    parser.add_argument('--filter', default='', metavar='TEXT', help='part of the names of weights, or of the links')
    parser.add_argument('--attempts', type=int, default=3, metavar='N', help='of a link that is dead, a minute apart')
    args = parser.parse_args()
    register()
    from cspnet_timm.families import WEIGHTS

    links: Dict[str, Source] = {}
    users: Dict[str, list] = {}
    for name, info in sorted(WEIGHTS.items()):
        for source in info.sources:
            if args.filter in name or args.filter in source.link:
                links.setdefault(source.link, source)
                users.setdefault(source.link, []).append(name)
    known = json.loads(args.known.read_text()) if args.known and args.known.exists() else {}
    answers: Dict[str, Answer] = {}
    for attempt in range(args.attempts):
        left = [link for link in links if link not in answers or answers[link].state == 'dead']
        if attempt and left:
            time.sleep(60)
        with ThreadPoolExecutor(8) as pool:
            answers.update(zip(left, pool.map(lambda link: check_link(links[link], known.get(link)), left)))
    for link, answer in answers.items():
        if answer.state != 'ok':
            print(f'{answer.state}: {link} ({", ".join(users[link])}): {answer.detail}')
        if answer.state in ('ok', 'moved') and answer.seen:
            known[link] = answer.seen
    counts = Counter(answer.state for answer in answers.values())
    print(', '.join(f'{counts[state]} {state}' for state in ('ok', 'moved', 'changed', 'dead')))
    if args.known:
        args.known.write_text(json.dumps(known, indent=1, sort_keys=True) + '\n')
    return int(counts['dead'] + counts['changed'] > 0)


if __name__ == '__main__':
    sys.exit(main())
