"""The applications that a run can torture: each plan has one. It works on the log, and some have tables of their own.

    plain.py     plan "log": producers in every way there is, and subscriptions that note what they handle
    bank.py      plan "bank": transfers, which transactional subscriptions debit and credit
    orders.py    plan "orders": orders that are inserted in the same transaction as their events

`application.py` says what an application is made of. The processes look theirs up by the name of the plan.
"""

from pgbackend.torture.applications import bank, orders, plain
from pgbackend.torture.applications.application import Application
from pgbackend.torture.plan import Name

APPLICATIONS: dict[Name, Application] = {
    "log": plain.APPLICATION,
    "bank": bank.APPLICATION,
    "orders": orders.APPLICATION,
}
