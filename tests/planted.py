"""Backends that end or hang their process, for the tests of deployment; another process imports them from here."""
import ctypes
import os
import signal
import time
from pathlib import Path

from cspnet_timm.deployment.backends.eager import Eager
from cspnet_timm.deployment.backends.torch_runner import Adapted, export, load_program, program_bytes


class Isolated(Eager):
    """PyTorch, by an exported program that another process reads."""

    name = 'isolated'
    isolated = True

    @classmethod
    def prepare(cls, model, example, precision, calibration=()):
        import torch

        return {'program.pt2': program_bytes(export(Adapted(model, torch.float32), example, dynamic=True))}

    convert = classmethod(lambda cls, *args: cls.finish(cls.prepare(*args), args[2], args[1].shape))


class Segfaults(Isolated):
    name = 'segfaults'

    @classmethod
    def finish(cls, prepared, precision, shape):
        ctypes.string_at(0)


class SegfaultsWhenRun(Isolated):
    name = 'segfaults_when_run'

    def runner(self, arrangement, threads):
        return lambda x: ctypes.string_at(0)


class Hangs(Isolated):
    name = 'hangs'

    @classmethod
    def finish(cls, prepared, precision, shape):
        Path(os.environ['PLANTED_PID']).write_text(str(os.getpid()))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(1)


class Killed(Isolated):
    """As the system ends a process where memory runs out."""

    name = 'killed'

    @classmethod
    def finish(cls, prepared, precision, shape):
        os.kill(os.getpid(), signal.SIGKILL)


class TooLarge(Isolated):
    """Asks for memory that there is not."""

    name = 'too_large'

    @classmethod
    def finish(cls, prepared, precision, shape):
        return bytearray(1 << 60)


class Exits(Isolated):
    name = 'exits'

    @classmethod
    def finish(cls, prepared, precision, shape):
        print('all is well')
        os._exit(3)


class EndsAll(Isolated):
    """Ends the process that it was forked from too."""

    name = 'ends_all'

    @classmethod
    def finish(cls, prepared, precision, shape):
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(30)


class Wrong(Isolated):
    name = 'wrong'

    def runner(self, arrangement, threads):
        run = super().runner(arrangement, threads)
        return lambda x: [y * (1 + (len(x) == 1)) for y in run(x)]


class Right(Isolated):
    name = 'right'
    imports = ('tests.planted_keeper',)

    @classmethod
    def finish(cls, prepared, precision, shape):
        from tests import planted_keeper

        assert 'cspnet-timm-' not in planted_keeper.FOLDER, 'which is removed'
        print('what a library prints goes elsewhere')
        return cls(load_program(prepared['program.pt2']).module(), lambda: prepared['program.pt2'])


ALL = [Segfaults, SegfaultsWhenRun, Hangs, Killed, TooLarge, Exits, EndsAll, Wrong, Right]
