# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fence's state machine against a naive one: sets of letters, and every rule spelt out where it is needed.

A letter is a feature; "s" is the absence of a risk (an or-bit, which guests have to be told), so that every set is an
ordinary one: meet is intersection, fits is inclusion.
"""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvmneg.errors import KvmnegError
from kvmneg.features.featureset import FeatureSet, fits
from kvmneg.features.words import X86_64
from kvmneg.policy import fence, pooling
from kvmneg.policy.fence_text import Fence
from kvmneg.policy.leases import Holding
from kvmneg.policy.level import Level, Step, ceiling
from kvmneg.policy.members import Measured

WORD, RISK = "cpuid:0x7.0.ebx", 1 << 6  # fdp-excptn-only
BITS = {"b": 1 << 3, "m": 1 << 7, "d": 1 << 18}  # bmi1, smep, rdseed: built on nothing
SETS = st.sets(st.sampled_from("bmds")).map(frozenset)
FULL = frozenset("bmds")
HIGH_SETS = st.one_of(st.just(FULL), st.sampled_from("bmds").map(lambda one: FULL - {one}), SETS)
FEW = st.sets(st.sampled_from("bmds"), min_size=1, max_size=2).map(frozenset)
HOSTS = st.sampled_from(("a", "b"))
VMS = st.sampled_from(("vm1", "vm2", "vm3"))
COMBOS = st.sampled_from(("old", "older"))


def real(letters: frozenset[str]) -> FeatureSet:
    """The feature set of some letters."""
    bits = sum(BITS[letter] for letter in letters & set(BITS))
    return FeatureSet.of(X86_64, {WORD: bits | (0 if "s" in letters else RISK)})


def letters(granted: FeatureSet) -> frozenset[str]:
    value = granted.value(WORD)
    found = {letter for letter, bit in BITS.items() if value & bit}
    return frozenset(found if value & RISK else found | {"s"})


class Host:
    """A host of the model: it bounds the level while it is in and not partial."""

    def __init__(self) -> None:
        self.where = "candidate"  # in, lost, draining, removed
        self.has: frozenset[str] | None = None
        self.seen = -1
        self.fresh = False
        self.partial = False
        self.back: dict[str, frozenset[str]] = {}
        self.told = 0
        self.off = False

    @property
    def bounds(self) -> bool:
        return self.where in ("in", "lost", "draining") and not self.partial


class Machine(RuleBasedStateMachine):
    """Every step is taken in both worlds: what the model forbids is refused, what it allows leads to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.level = Level()
        self.hosts: dict[str, Host] = {}
        self.fence: frozenset[str] | None = None  # F
        self.floats: frozenset[str] | None = None  # E of a pool that floats
        self.plan: tuple[str, frozenset[str], int] | None = None  # raise or lower, F', when
        self.generation = 0
        self.clock = 0
        self.frozen = False
        self.guests: dict[str, frozenset[str] | None] = {}
        self.audit: list[str] = []

    # -- the model --------------------------------------------------------------------------------

    @property
    def effective(self) -> frozenset[str] | None:
        if self.plan and self.plan[0] == "lower":
            return self.plan[1]
        return self.floats if self.fence is None else self.fence

    def bounding(self) -> list[Host]:
        return [host for host in self.hosts.values() if host.bounds]

    def bounds(self) -> list[frozenset[str]]:
        """Every set that C is the meet of."""
        return [one for host in self.bounding() for one in (host.has or frozenset(), *host.back.values())]

    def top(self) -> frozenset[str]:
        return frozenset.intersection(*self.bounds())

    def breached(self) -> bool:
        wanted = self.effective
        return wanted is not None and any(not wanted <= (host.has or frozenset()) for host in self.bounding())

    def all_here(self, after: int = -1) -> bool:
        hosts = self.bounding()
        return bool(hosts) and all(h.where != "lost" and h.fresh and h.seen > after for h in hosts)

    def within(self, wanted: frozenset[str]) -> bool:
        return all(wanted <= one for one in self.bounds())

    def above(self, wanted: frozenset[str]) -> set[str]:
        return {vm for vm, has in self.guests.items() if has is None or not has <= wanted}

    def state(self) -> str:
        if self.frozen:
            return "readonly"
        if self.breached():
            return "breached"
        if self.fence is None:
            return "floating"
        return {"raise": "raising", "lower": "lowering"}[self.plan[0]] if self.plan else "pinned"

    def sink(self) -> None:
        """A pool that floats follows its members down."""
        if self.fence is None and self.bounding():
            self.floats = self.top() if self.floats is None else self.floats & self.top()

    # -- both worlds ------------------------------------------------------------------------------

    def take(self, allowed: bool, function: Any, *given: Any, **named: Any) -> bool:
        """Take a step in the real world, which must be possible exactly where the model allows it."""
        before = self.visible()
        try:
            step: Step = function(self.level, *given, **named)
        except KvmnegError as error:
            assert not allowed, error
            return False
        assert allowed, step
        old, self.level = self.level, step.level
        assert self.level.generation >= old.generation
        if step.action:
            self.audit.append(step.action)
        assert step.action or self.visible() == before, "a change without its audit record"
        return True

    def visible(self) -> tuple[Any, ...]:
        """What nobody may change without a record."""
        level = self.level
        hosts = [
            (one.host, one.state, one.partial, tuple(c.combo for c in one.roll)) for one in level.members
        ]
        proposal = level.proposal and (level.proposal.kind, level.proposal.fence.digest)
        return level.generation, level.fence, level.floor, proposal, hosts, level.readonly, level.state

    def holdings(self) -> list[Holding]:
        return [
            Holding(vm, "", None if has is None else real(has), "running", 0)
            for vm, has in self.guests.items()
        ]

    def measure(self, name: str, has: frozenset[str]) -> Measured:
        return Measured(f"{name}-now", "now", real(has))

    # -- hosts ------------------------------------------------------------------------------------

    @initialize(has=HIGH_SETS, partial=st.booleans(), wanted=st.one_of(st.none(), FEW))
    def first(self, has: frozenset[str], partial: bool, wanted: frozenset[str] | None) -> None:
        """A member that has everything, another one, and mostly a fence."""
        for name in ("a", "b"):
            self.become_candidate(name)
            self.report(name, FULL if name == "a" else has)
            self.join(name, name == "b" and partial)
        if wanted is not None and self.bounding():
            self.pin(self.top() - wanted)

    @rule(name=HOSTS)
    def become_candidate(self, name: str) -> None:
        known = self.hosts.get(name)
        allowed = not self.frozen and (known is None or known.where in ("candidate", "removed"))
        if self.take(allowed, pooling.candidate, name):
            self.hosts[name] = Host()

    @rule(name=HOSTS, has=HIGH_SETS)
    def report(self, name: str, has: frozenset[str]) -> None:
        host = self.hosts.get(name)
        self.clock += 1
        found = self.measure(name, has)
        if self.take(host is not None and host.where != "removed", pooling.measured, name, found, self.clock):
            assert host is not None
            host.has, host.seen, host.fresh, host.off = has, self.clock, True, False
            host.where = "in" if host.where == "lost" else host.where
            self.sink()

    @rule(name=HOSTS, partial=st.booleans())
    def join(self, name: str, partial: bool) -> None:
        host = self.hosts.get(name)
        ready = host is not None and host.where == "candidate" and host.has is not None and host.fresh
        strong = ready and (partial or self.fence is None or self.effective <= host.has)  # type: ignore[operator, union-attr]
        if self.take(bool(strong) and not self.frozen, pooling.join, name, partial=partial):
            assert host is not None
            host.where, host.partial, host.told = "in", partial, self.generation
            self.sink()

    @rule(name=HOSTS, what=st.sampled_from(("stale", "lost", "lost", "drain", "remove", "fence_off")))
    def leave(self, name: str, what: str) -> None:
        host = self.hosts.get(name)
        where = host.where if host else ""
        allowed = {
            "stale": True,
            "lost": True,
            "drain": where == "in" and not self.frozen,
            "remove": not self.frozen,
            "fence_off": where == "lost",
        }[what]
        if not self.take(host is not None and allowed, getattr(pooling, what), name):
            return
        assert host is not None
        if what == "drain":
            host.where = "draining"
        elif what == "remove":
            host.where, host.back, host.partial = "removed", {}, False
        elif what == "fence_off":
            host.off = True
        elif what == "stale":
            host.fresh = False
        elif where in ("in", "draining"):
            host.where, host.fresh = "lost", False

    @rule(name=HOSTS, combo=COMBOS, has=HIGH_SETS)
    def want_back(self, name: str, combo: str, has: frozenset[str]) -> None:
        host = self.hosts.get(name)
        allowed = host is not None and not self.frozen and (self.fence is None or self.fence <= has)
        if self.take(allowed, pooling.roll_add, name, Measured(combo, combo, real(has))):
            assert host is not None
            host.back.setdefault(combo, has)
            self.sink()

    @rule(name=HOSTS, combo=COMBOS)
    def want_back_no_more(self, name: str, combo: str) -> None:
        host = self.hosts.get(name)
        known = host is not None and combo in host.back
        if self.take(known and not self.frozen, pooling.roll_remove, name, combo):
            assert host is not None
            del host.back[combo]

    @rule(better=st.booleans())
    def all_report_and_acknowledge(self, better: bool) -> None:
        """What quiet days are made of, and upgrades of every host."""
        for name, host in self.hosts.items():
            if host.where != "removed":
                self.report(name, FULL if better else host.has or frozenset())
                self.acknowledge(name)

    @rule(name=HOSTS)
    def acknowledge(self, name: str) -> None:
        host = self.hosts.get(name)
        if self.take(host is not None, pooling.acknowledge, name, self.generation):
            assert host is not None
            host.told = max(host.told, self.generation)

    # -- the fence --------------------------------------------------------------------------------

    @rule(less=FEW)
    def pin_a_little_less_than_all_have(self, less: frozenset[str]) -> None:
        if self.bounding():
            self.pin(self.top() - less)

    @rule(wanted=SETS)
    def pin(self, wanted: frozenset[str]) -> None:
        lowers = self.fence is not None and not self.fence <= wanted
        allowed = (
            not self.frozen
            and self.plan is None
            and self.all_here()
            and self.within(wanted)
            and not (lowers and self.above(wanted))
        )
        if self.take(allowed, fence.pin, Fence(real(wanted)), self.holdings()):
            self.fence, self.floats, self.generation = wanted, None, self.generation + 1

    @rule()
    def unpin(self) -> None:
        allowed = not self.frozen and self.plan is None and self.all_here()
        if allowed and self.fence is None:
            allowed = self.floats is not None and self.floats < self.top()
        elif allowed and self.fence is not None and not self.fence <= self.top():
            allowed = not self.above(self.top())
        if self.take(allowed, fence.unpin, self.holdings()):
            self.fence, self.floats, self.generation = None, self.top(), self.generation + 1

    @rule(more=FEW, wanted=SETS, wild=st.booleans())
    def propose_to_raise(self, more: frozenset[str], wanted: frozenset[str], wild: bool) -> None:
        self.clock += 1
        wanted = wanted if wild else (self.fence or frozenset()) | more
        free = self.fence is not None and self.plan is None and not self.frozen and not self.breached()
        allowed = free and self.fence is not None and self.fence < wanted
        if self.take(allowed, fence.propose_raise, Fence(real(wanted)), self.clock):
            self.plan = "raise", wanted, self.clock

    @rule(less=FEW, wanted=SETS, wild=st.booleans(), urgent=st.booleans())
    def propose_to_lower(
        self, less: frozenset[str], wanted: frozenset[str], wild: bool, urgent: bool
    ) -> None:
        self.clock += 1
        wanted = wanted if wild else (self.effective or frozenset()) - less
        free = (
            self.fence is not None
            and not self.frozen
            and (urgent or not self.plan or self.plan[0] == "lower")
        )
        allowed = free and self.effective is not None and wanted < self.effective and self.within(wanted)
        if self.take(allowed, fence.propose_lower, Fence(real(wanted)), self.clock, urgent=urgent):
            self.plan, self.generation = ("lower", wanted, self.clock), self.generation + 1

    @precondition(lambda self: self.plan is not None)
    @rule(consent=st.sampled_from((set(), {"old"}, {"old", "older"})), override=st.sets(VMS))
    def commit(self, consent: set[str], override: set[str]) -> None:
        allowed = self.plan is not None and not self.frozen
        left: list[tuple[Host, str]] = []
        if allowed and self.plan is not None and self.plan[0] == "raise":
            wanted = self.plan[1]
            left = [(h, c) for h in self.bounding() for c, has in h.back.items() if not wanted <= has]
            allowed = not self.breached() and self.all_here(self.plan[2])
            allowed = allowed and all(wanted <= (host.has or frozenset()) for host in self.bounding())
            allowed = allowed and {combo for _, combo in left} <= consent
        elif allowed and self.plan is not None:
            sure = [h.off or (h.where != "lost" and h.told == self.generation) for h in self.bounding()]
            allowed = all(sure) and self.within(self.plan[1]) and self.above(self.plan[1]) <= override
        if self.take(allowed, fence.commit, self.holdings(), consent=consent, override=override):
            assert self.plan is not None
            for host, combo in left:
                del host.back[combo]
            self.generation += self.plan[0] == "raise"
            self.fence, self.plan = self.plan[1], None

    @precondition(lambda self: self.plan is not None)
    @rule(late=st.booleans())
    def abort(self, late: bool) -> None:
        allowed = self.plan is not None and not self.frozen
        if allowed and self.plan is not None and self.plan[0] == "lower":
            allowed = self.all_here() and self.within(self.fence or frozenset())
        if self.take(allowed, fence.abort, timed_out=late):
            assert self.plan is not None
            self.generation += self.plan[0] == "lower"
            self.plan = None

    @rule(name=HOSTS, has=HIGH_SETS, wanted=SETS)
    def a_while_read_only(self, name: str, has: frozenset[str], wanted: frozenset[str]) -> None:
        """Whatever an admin asks for meanwhile is refused, and hosts change all the same."""
        self.take(True, fence.freeze, "no space")
        self.frozen = True
        self.pin(wanted)
        self.unpin()
        self.propose_to_raise(wanted, wanted, False)
        self.propose_to_lower(wanted, wanted, False, True)
        self.commit({"old", "older"}, set(self.guests))
        self.abort(False)
        self.join(name, True)
        self.report(name, has)
        self.the_worlds_agree()
        self.take(True, fence.thaw)
        self.frozen = False

    # -- guests -----------------------------------------------------------------------------------

    @rule(name=HOSTS, vm=VMS, asks=SETS)
    def start(self, name: str, vm: str, asks: frozenset[str]) -> None:
        host, wanted = self.hosts.get(name), self.effective
        here = host is not None and host.where == "in" and host.fresh and wanted is not None
        may = here and host is not None and (host.partial or not self.breached())
        try:
            granted = letters(pooling.grants(self.level, name))
        except KvmnegError as error:
            assert not may, error
            return
        assert may and host is not None and host.has is not None and wanted is not None
        assert granted == wanted & host.has
        assert granted <= wanted, "a new contract exceeds the effective level"
        self.guests[vm] = granted & asks

    @rule(vm=VMS)
    def find_unknown(self, vm: str) -> None:
        self.guests[vm] = None

    @precondition(lambda self: self.guests)
    @rule(vm=VMS)
    def end(self, vm: str) -> None:
        self.guests.pop(vm, None)

    # -- what always holds ------------------------------------------------------------------------

    @invariant()
    def the_worlds_agree(self) -> None:
        level = self.level
        assert level.generation == self.generation
        assert level.state == self.state()
        effective = level.effective
        assert (None if effective is None else letters(effective.granted)) == self.effective
        assert (None if level.fence is None else letters(level.fence.granted)) == self.fence
        top = ceiling(level)
        assert (None if top is None else letters(top)) == (self.top() if self.bounding() else None)
        for member in level.members:
            host = self.hosts[member.host]
            low = self.effective is not None and not self.effective <= (host.has or frozenset())
            named = {"lost": "unreachable", "in": "deficient" if low else "member"}
            assert member.state == named.get(host.where, host.where)

    @invariant()
    def the_level_is_under_the_ceiling_or_breached(self) -> None:
        top, effective = ceiling(self.level), self.level.effective
        if self.level.state not in ("breached", "readonly") and top is not None and effective is not None:
            assert not fits(effective.granted, top)


Machine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
TestMachine = Machine.TestCase
