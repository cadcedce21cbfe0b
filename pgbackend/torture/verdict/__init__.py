"""The verdict: what was acknowledged, handled and committed, checked against the promises. Pure.

    judge.py       reads the records once, in the order of time, and gives each fact to the rules
    facts:         events.py (what was produced, and the log), leases.py (who owned which shard when),
                   timeline.py (the faults), progress.py (what became of each event)
    rules:         stored.py, repeats.py, owners.py, order.py, attempts.py, rest.py
    effects.py     the plans "bank" and "orders": what took effect, and what held at each moment;
                   bank.py and orders.py judge the rest of them, without excuses
    rulings.py     the promises, and the result

**Only the plan is an excuse.** A repeat, an overlap, a late event, or an attempt that counts though nobody saw it end
needs a cause, and the only causes are faults that the plan injected: kill, stop, cut, stall, terminate, a restart of
the server. `timeline.py` says for how long each of them explains what follows. A connection that broke without a fault,
or a process that was silent, is counted in the report and excuses nothing.

**Three outcomes.** If a finding has no cause, the promise is broken. If the only cause is that the machine itself stood
still, the run is not judged: it was neither kept nor broken. `machine.py`, a process that takes no part in the run,
measures that. A stall counts from the length of a heartbeat on, and explains only what a fault of every process at that
time would explain. No stall excuses a lost event, a commit by a former owner, a wrong order under one lease, or an
event that is in the log twice.
"""
