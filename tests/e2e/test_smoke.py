"""The thinnest true path: what everything else widens."""


def test_a_virtual_key_goes_through_and_is_charged_what_it_cost(any_stack):
    key_id, token = any_stack.new_key("1.00")
    before = any_stack.sim.totals()["overall"]["cost_nanodollars"]
    status, headers, body = any_stack.chat(token)
    assert status == 200, body
    any_stack.settled(key_id)
    any_stack.sim.quiet()
    cost = any_stack.sim.totals()["overall"]["cost_nanodollars"] - before
    assert cost > 0 and any_stack.key(key_id)["spent_nanodollars"] == cost
    events = [entry["event"] for entry in any_stack.audit(key_id)]
    assert events == ["KEY_CREATED", "ADMITTED", "SETTLED"]
    assert any_stack.sim.totals()["violations"] == []
