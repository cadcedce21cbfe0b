"""CloudEvents SQL, version 1: the text of an expression becomes a function of an event.

`parser.py` reads the text and builds the function out of `operators.py` and `functions.py`; `values.py` has the types.
`filters.CESQL` compiles a text once and calls the function for each event. The promise: `compile_expression` returns
or raises a `ConfigError` that says where the text is wrong; the function never raises, changes nothing, and takes time
proportional to the length of the text times the size of the event.

Where the specification leaves a choice, it is made like this:

    a result beyond 32 bits     is a math error, as for ABS
    the elements of IN          are a set without order: an error in one counts even if another matches
    names in capitals           are the same attributes, as for keywords and functions: `SOURCE` is `source`
    keywords                    are not attribute names
    a backslash in a string     escapes the quote that delimits the string; before anything else it is a backslash
    an unknown function         is an error of evaluation, but `mistake` reports it when the text is read

Two rules of the specification are surprising: AND, OR and XOR bind equally, from left to right; and NOT binds closer
than LIKE, IN and comparisons.
"""

from pgbackend.codec.cesql.parser import Expression, compile_expression
from pgbackend.codec.cesql.values import Error, Evaluate, Failed

__all__ = ["Error", "Evaluate", "Expression", "Failed", "compile_expression"]
