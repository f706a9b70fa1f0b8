# SPDX-License-Identifier: Apache-2.0
"""Making a guest somebody else: the steps, in order, judged at the end.

1. Each step changes its kind of identity. The first one reseeds the random generator.
   Then the guest's own hooks run.
2. What was written is on the guest's disks (`sync`), or a reset would bring it back.
3. All is read once more: what runs in the guest may have undone an earlier step.
4. It is compared with the source and all siblings.

When any of it fails, the guest has some identities of its own and some of the source;
nothing is put back, as there is nobody else to be. All of it can be done again.
"""

import contextlib
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from oslo_log import log as logging

from virtmigrate import errors
from virtmigrate.identity import comparing, hooks, model, notunique, steps
from virtmigrate.identity.guest import Guest, Timed
from virtmigrate.identity.steps import base

LOG = logging.getLogger(__name__)


@dataclass
class _Done:
    """What became of a step so far."""

    step: steps.Step
    how: str = ""
    seconds: float = 0.0
    problem: str = ""  # why it is not proven; its risk was taken


def nothing(every: Sequence[steps.Step], risk: Collection[str]) -> model.Report:
    """Return the report of a guest that nobody could change."""
    names = tuple(step.name for step in every)
    return model.Report(
        steps=(),
        not_unique=(*names, *notunique.KEPT),
        unproven=(*sorted(set(risk) - set(names)), *names),
        ok=False,
        began=time.time(),
    )


@dataclass
class Work:
    """One guest that is made somebody else. Belongs to one thread."""

    guest: Guest
    wanted: model.Wanted
    limits: model.Limits
    risk: Collection[str]
    done: list[_Done] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._began = time.monotonic()
        self._wall = time.time()

    def run(
        self,
        every: Sequence[steps.Step],
        source: model.Identities,
        siblings: Sequence[model.Identities],
    ) -> model.Report:
        """Do all steps, and return what they did.

        Raises IdentityFailed: the guest has to stay off the network.
        """
        for step in every:
            self.done.append(self._change(step))
        self.done.append(self._change(_Hooks(self.limits)))
        self._change(_Sync())
        after = self._read_back()
        self._judge(after, [source, *siblings])
        report = self._report(source, after, len(siblings))
        LOG.info(
            "instance=%s is somebody else steps=%d ok=%s seconds=%.1f",
            self.guest.instance,
            len(report.steps),
            report.ok,
            report.seconds,
        )
        return report

    # Private

    def _change(self, step: steps.Step) -> _Done:
        done = _Done(step)
        began = time.monotonic()
        try:
            with self._failing(done):
                done.how = step.change(self._timed(step.name), self.wanted)
        finally:
            done.seconds = time.monotonic() - began
        LOG.debug(
            "instance=%s step=%s seconds=%.2f problem=%s",
            self.guest.instance,
            step.name,
            done.seconds,
            done.problem,
        )
        return done

    @contextlib.contextmanager
    def _failing(self, done: _Done) -> Iterator[None]:
        """Note why a step fails if its risk was taken; IdentityFailed if not."""
        try:
            yield
        except errors.IdentityFailed:
            raise
        except (errors.GuestFailed, errors.HookFailed) as e:
            self._demand_risked(done.step.name, e)
            done.problem = done.problem or str(e)
        except Exception as e:
            # The host, the domain, or a fault in a step: no risk that one can take.
            raise self._failed(done.step.name, e) from e

    def _read_back(self) -> model.Identities:
        found: dict[str, str] = {}
        for done in self.done:
            began = time.monotonic()
            with self._failing(done):
                found |= done.step.read(self._timed(done.step.name))
            done.seconds += time.monotonic() - began
        return model.Identities(found)

    def _judge(
        self, after: model.Identities, others: Sequence[model.Identities]
    ) -> None:
        """Raise IdentityFailed unless all is proven, or its risk taken."""
        same = comparing.shared(after, others)
        for done in self.done:
            name = done.step.name
            mine = comparing.of_step(after, name)
            problem = _doubt(done.step, mine, same, self.wanted)
            if problem:
                self._demand_risked(name, problem)
                done.problem = done.problem or problem

    def _demand_risked(self, name: str, reason: object) -> None:
        """Raise IdentityFailed unless the caller took this risk by its name."""
        if name in self.risk:
            LOG.warning("instance=%s risked=%s %s", self.guest.instance, name, reason)
            return
        raise self._failed(name, reason) from (
            reason if isinstance(reason, Exception) else None
        )

    def _failed(self, name: str, reason: object) -> errors.IdentityFailed:
        done = [each.step.name for each in self.done if not each.problem]
        state = f"of its identities {', '.join(done) or 'none'} were changed until then"
        return errors.IdentityFailed(
            instance=self.guest.instance,
            host=self.guest.host,
            step=name,
            reason=str(reason),
            state=state,
        )

    def _timed(self, name: str) -> Timed:
        left = self._began + self.limits.whole - time.monotonic()
        if left <= 0:
            raise self._failed(name, f"not done within {self.limits.whole:g} s")
        return Timed(self.guest, min(left, self.limits.of(name)))

    def _report(
        self, source: model.Identities, after: model.Identities, siblings: int
    ) -> model.Report:
        unproven = [d.step.name for d in self.done if d.problem]
        unproven += sorted(set(self.risk) - set(unproven))
        return model.Report(
            steps=tuple(self._told(done, source, after) for done in self.done),
            not_unique=notunique.KEPT,
            unproven=tuple(unproven),
            ok=not unproven,
            compared=siblings,
            began=self._wall,
            seconds=time.monotonic() - self._began,
        )

    def _told(
        self, done: _Done, source: model.Identities, after: model.Identities
    ) -> model.Step:
        before = comparing.of_step(source, done.step.name)
        mine = comparing.of_step(after, done.step.name)
        state = model.State.CHANGED
        proof = done.problem
        if done.problem:
            state = model.State.FAILED
        elif isinstance(done.step, _Hooks) and done.step.ran:
            proof = "each ended with 0"
        elif not before and not mine:
            state, proof = model.State.ABSENT, "nothing to read, before and after"
        else:
            proof = done.step.proof(mine, self.wanted)
        return model.Step(
            done.step.name, before, mine, done.how, proof, done.seconds, state
        )


class _Sync(base.Scripts):
    """What was written is on the guest's disks."""

    name = "sync"
    CHANGE = "sync"


class _Hooks(base.Scripts):
    """The guest's own hooks, as a step that has no identities to be read."""

    name = "hooks"

    def __init__(self, limits: model.Limits) -> None:
        self._limits = limits
        self.ran: tuple[str, ...] = ()

    def read(self, asked: Timed) -> dict[str, str]:
        """Return nothing: what they changed belongs to other steps."""
        return {}

    def change(self, asked: Timed, wanted: model.Wanted) -> str:
        """Run them, each under a limit of its own."""
        self.ran = hooks.run(asked.guest, hooks.Moment.CLONE, self._limits)
        return f"ran {', '.join(self.ran) or 'none'}"


def _doubt(
    step: steps.Step, mine: dict[str, str], same: dict[str, str], wanted: model.Wanted
) -> str:
    """Return why a step is not proven, or nothing."""
    kept = sorted(same.keys() & mine.keys())
    if kept:
        return f"{', '.join(kept)} is the source's or a sibling's: {same[kept[0]]}"
    try:
        step.proof(mine, wanted)
    except ValueError as e:
        return str(e)
    return ""
