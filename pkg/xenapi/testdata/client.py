"""The calls of the usual Python session class, with the standard library."""
import sys
import xmlrpc.client


def value(answer):
    assert set(answer) in ({"Status", "Value"}, {"Status", "ErrorDescription"}), answer
    if answer["Status"] != "Success":
        raise RuntimeError(answer["ErrorDescription"])
    return answer["Value"]


def failure(answer):
    assert answer["Status"] == "Failure", answer
    return answer["ErrorDescription"]


url, user, password = sys.argv[1:]
server = xmlrpc.client.ServerProxy(url + "/RPC2", allow_none=True)

assert "pool_patch.get_all_records" in server.system.listMethods()
assert failure(server.session.login_with_password(user, "wrong"))[0] == "SESSION_AUTHENTICATION_FAILED"
for params in ((user, password), (user, password, "1.10"), (user, password, "2.5", "python")):
    s = value(server.session.login_with_password(*params))
assert failure(server.session.login_with_password(user)) == \
    ["MESSAGE_PARAMETER_COUNT_MISMATCH", "session.login_with_password", "2", "1"]

host = value(server.session.get_this_host(s, s))
assert value(server.host.get_API_version_major(s, host)) == "2"
assert value(server.host.get_API_version_minor(s, host)) == "5"
pool, = value(server.pool.get_all(s))
assert value(server.pool.get_master(s, pool)) == host
assert value(server.session.get_record(s, s))["originator"] == "python"

(patch, record), = value(server.pool_patch.get_all_records_where(s, 'field "name_label"="P1"')).items()
assert record["size"] == "5000000000" and record["after_apply_guidance"] == ["restartHost"], record
assert value(server.pool_patch_get_by_uuid(s, record["uuid"])) == patch
assert failure(server.pool_patch.get_uuid(s, None)) == ["HANDLE_INVALID", "pool_patch", "OpaqueRef:NULL"]

start = value(server.event.inject(s, "pool", pool))
value(server.pool.add_to_other_config(s, pool, "caf\u00e9 <&>", "\U0001f600"))
batch = value(getattr(server.event, "from")(s, ["pool", "task"], start, 10.0))
event, = [e for e in batch["events"] if e["class"] == "pool"]
assert event["operation"] == "mod" and event["ref"] == pool and event["timestamp"] == "0.0", event
assert event["snapshot"]["other_config"] == {"caf\u00e9 <&>": "\U0001f600"}, event
assert batch["valid_ref_counts"]["pool"] == 1, batch

task = value(getattr(server, "Async.pool_patch.pool_apply")(s, patch))
while value(server.task.get_status(s, task)) == "pending":
    getattr(server.event, "from")(s, ["task/" + task], batch["token"], 5.0)
assert value(server.task.get_result(s, task)) == "<value></value>"
value(server.task.destroy(s, task))
assert value(server.host.get_servertime(s, host)).value.endswith("Z")

value(server.session.logout(s))
assert failure(server.pool.get_all(s))[0] == "SESSION_INVALID"
print("ok")
