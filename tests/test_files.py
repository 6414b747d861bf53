"""Files and folders appear complete or not at all."""
import os

import pytest

from cspnet_timm.files import replaced_file, replaced_folder


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / ('long' * 60 + '.txt')
    path.write_text('old')
    path.chmod(0o640)
    link = tmp_path / 'link'
    link.symlink_to(path)
    with replaced_file(link) as temporary:
        assert temporary.suffix == '.txt'
        temporary.write_text('new')
        assert path.read_text() == 'old'
    assert path.read_text() == 'new' and path.stat().st_mode & 0o777 == 0o640 and link.is_symlink()
    with pytest.raises(KeyError), replaced_file(path) as temporary:
        temporary.write_text('half')
        raise KeyError
    assert path.read_text() == 'new' and sorted(p.name for p in tmp_path.iterdir()) == sorted([link.name, path.name])


def test_what_is_no_file_is_not_replaced(tmp_path):
    with replaced_file(os.devnull) as path:
        path.write_text('gone')
    assert not os.path.isfile(os.devnull)
    with pytest.raises(IsADirectoryError), replaced_file(tmp_path):
        raise AssertionError('work has begun')


def test_a_folder_is_replaced_whole(tmp_path):
    place = tmp_path / 'deep' / 'folder'
    for text in ('first', 'second'):
        with replaced_folder(place, overwrite=text == 'second') as folder:
            (folder / text).write_text(text)
        assert [p.name for p in place.iterdir()] == [text]
    with pytest.raises(KeyError), replaced_folder(place, overwrite=True) as folder:
        (folder / 'half').touch()
        raise KeyError
    # Somebody else was faster, between the caller's own look and the end.
    with pytest.raises(FileExistsError), replaced_folder(place) as folder:
        (folder / 'late').touch()
    with pytest.raises(NotADirectoryError), replaced_folder(place / 'second'):
        raise AssertionError('work has begun')
    assert [p.name for p in place.iterdir()] == ['second'] and [p.name for p in place.parent.iterdir()] == ['folder']
    place = tmp_path / 'empty'
    place.mkdir()
    with replaced_folder(place) as folder:
        (folder / 'file').touch()
    assert [p.name for p in place.iterdir()] == ['file']
