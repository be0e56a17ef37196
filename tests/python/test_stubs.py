"""The committed stub of the compiled module is what the module says of itself."""

import stubs


def test_the_stub_is_up_to_date() -> None:
    assert stubs.STUB.read_text(encoding="utf-8") == stubs.generate(), "run `make stubs`"
