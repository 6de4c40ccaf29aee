"""Training that stops in the middle, to be gone on with."""

import pytest

from topt_deploy.train.loop import TrainingDevice


class Interrupted(Exception):
    pass


def interrupt_at(monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    """Let training fail in this epoch, counted from the first epoch of any stage on."""
    compiled = TrainingDevice.compiled
    count = 0

    def interrupted(self, loss):
        step = compiled(self, loss)

        def counted():
            nonlocal count
            count += 1
            if count > epoch:
                raise Interrupted
            return step()

        return counted

    monkeypatch.setattr(TrainingDevice, "compiled", interrupted)
