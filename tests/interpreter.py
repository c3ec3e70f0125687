"""Triton's interpreter in less than half its time, with the same results.

Of Triton 3.6's time in Python most goes into what nobody reads or what is known already: a check of integer overflow
whose result `device_assert` drops, functions of `triton.language` that are patched anew at every call of a device
function, types of tuples that nobody asks for, and a table of types that is made at every look into it.
"""

from dataclasses import replace
from functools import cache, cached_property, wraps


@cache
def hurry() -> None:
    """Do without all that, from now on; with another version of Triton leave the interpreter as it is."""
    import triton

    if not triton.__version__.startswith("3.6."):
        return
    from triton.language import core
    from triton.runtime import interpreter

    drop_unread_checks(interpreter)
    patch_once(interpreter)
    find_types_when_asked(core)
    know_types(interpreter, core)


def drop_unread_checks(interpreter) -> None:
    """Of sums and products of integers: their result is asserted where `debug` is set, which it is not."""
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)


def patch_once(interpreter) -> None:
    """Within a launch patch what functions of a module see at the first call of one of them."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched = {}

    @wraps(patch)
    def patch_lang(fn):
        if id(fn.__globals__) in patched:
            return interpreter._LangPatchScope()  # in which nothing is to be restored
        scope = patch(fn)
        patched[id(fn.__globals__)] = scope
        return scope

    @wraps(launch)
    def call(self, *arguments, **options):
        try:
            return launch(self, *arguments, **options)
        finally:
            patched.clear()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_lang, call


def find_types_when_asked(core) -> None:
    """Of a tuple, such as a shape: from its values, the first time that somebody asks."""
    make, found = core.tuple.__init__, cached_property(lambda self: core._type_for_tuple_values(self.values))

    @wraps(make)
    def init(self, args, type=None):
        if type is None:
            self.values = list(args)
        else:
            make(self, args, type)

    found.__set_name__(core.tuple, "type")
    core.tuple.__init__, core.tuple.type = init, found


def know_types(interpreter, core) -> None:
    """Look up NumPy's type of a number by the name of Triton's, which both are the only ones of their name."""
    find, known = interpreter._get_np_dtype, {}

    @wraps(find)
    def get(of):
        name = of.scalar.name
        if name not in known:
            known[name] = find(of)
        return known[name]

    interpreter._get_np_dtype = get
