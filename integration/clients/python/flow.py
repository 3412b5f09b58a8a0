"""The whole life of a patch with nothing but Python's standard library.

Called with the plan that the Go test wrote. Session keeps the habits of the
session classes that Python programs use: a session ref put before every call's
arguments, a new login when the session has ended, the version asked for after
the login.
"""
import http.client
import json
import ssl
import sys
import time
import urllib.error
import urllib.request
import xmlrpc.client

TLS = ssl.create_default_context()
TLS.check_hostname = False
TLS.verify_mode = ssl.CERT_NONE


class Failure(Exception):
    def __init__(self, details):
        super().__init__(details)
        self.details = details


def value(answer):
    if answer["Status"] != "Success":
        raise Failure(answer["ErrorDescription"])
    return answer["Value"]


class Session:
    """Calls as attributes: session.pool_patch.apply(patch, host)."""

    def __init__(self, url, *login, method="login_with_password"):
        self.url, self.credentials, self.method = url, login, method
        self.server = xmlrpc.client.ServerProxy(url, allow_none=True, context=TLS if url.startswith("https") else None)
        self.logins = 0
        self.login()

    def login(self):
        self.handle = value(getattr(self.server.session, self.method)(*self.credentials))
        self.logins += 1

    def call(self, name, *args):
        for _ in range(3):
            try:
                return value(getattr(self.server, name)(self.handle, *args))
            except Failure as f:
                if f.details[0] != "SESSION_INVALID":
                    raise
                self.login()
        raise AssertionError("no session after three logins")

    def version(self):
        pool, = self.pool.get_all()
        master = self.pool.get_master(pool)
        return "%s.%s" % (self.host.get_API_version_major(master), self.host.get_API_version_minor(master))

    def __getattr__(self, name):
        return Method(self.call, name)


class Method:
    def __init__(self, call, name):
        self.send, self.name = call, name

    def __getattr__(self, name):
        return Method(self.send, self.name + "." + name)

    def __call__(self, *args):
        return self.send(self.name, *args)


def fails(details, call, *args):
    try:
        got = call(*args)
    except Failure as f:
        assert f.details == details, f.details
        return
    raise AssertionError("succeeded with %r instead of %r" % (got, details))


def put(url, data, **headers):
    request = urllib.request.Request(url, data=data, method="PUT", headers=headers)
    try:
        with urllib.request.urlopen(request, context=TLS if url.startswith("https") else None) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as e:
        return e.code, e.read()


def finished(s, task):
    """Polls as most programs do."""
    while s.task.get_status(task) in ("pending", "cancelling"):
        time.sleep(0.05)
    record = s.task.get_record(task)
    s.task.destroy(task)
    fails(["HANDLE_INVALID", "task", task], s.task.get_status, task)
    return record


def upload(s, patch, data=None):
    task = s.task.create("upload", "by Python")
    if data is None:
        data = open(patch["file"], "rb").read()
    status, _ = put("%s/pool_patch_upload?session_id=%s&task_id=%s" % (s.url, s.handle, task), data)
    assert status == 200, status
    return finished(s, task)


def uploaded(s, patch):
    record = upload(s, patch)
    assert record["status"] == "success", record
    text = "<params><param>%s</param></params>" % record["result"]
    (ref,), _ = xmlrpc.client.loads(text)
    assert ref == s.pool_patch.get_by_uuid(patch["uuid"])
    return ref


def logins(url, user, password):
    for params in ((user, password), (user, password, "1.10"), (user, password, "2.5", "python")):
        s = Session(url, *params)
        assert s.version() == "2.5"
        assert s.session.get_originator(s.handle) == (params[3] if len(params) > 3 else "")
        value(s.server.session.logout(s.handle))
        assert s.server.pool.get_all(s.handle)["ErrorDescription"] == ["SESSION_INVALID", s.handle]
    s = xmlrpc.client.ServerProxy(url, context=TLS)
    assert s.session.login_with_password(user)["ErrorDescription"] == \
        ["MESSAGE_PARAMETER_COUNT_MISMATCH", "session.login_with_password", "2", "1"]
    assert s.session.login_with_password(user, "wrong")["ErrorDescription"][:2] == ["SESSION_AUTHENTICATION_FAILED", user]


def records(s):
    """Every class that can be listed gives whole records of plain types."""
    names = s.server.system.listMethods()
    for name in names:
        if not name.endswith(".get_all_records"):
            continue
        for ref, record in s.call(name).items():
            assert ref.startswith("OpaqueRef:") and record["uuid"], (name, ref, record)
            assert None not in record.values(), (name, record)
            assert not any(type(v) is int for v in record.values()), (name, record)
            cls = name.split(".")[0]
            if cls != "message":
                assert s.call(cls + ".get_by_uuid", record["uuid"]) == ref
                assert s.call(cls + ".get_record", ref).keys() == record.keys()


def events(s, token=""):
    return getattr(s.event, "from")(["pool_patch", "host_patch", "Task"], token, 5.0)


def life(s, patches):
    host = s.session.get_this_host(s.handle)
    token = events(s)["token"]
    first = uploaded(s, patches["first"])

    seen = {}
    while ("pool_patch", first) not in seen:
        batch = events(s, token)
        token = batch["token"]
        seen.update({(e["class"], e["ref"]): e for e in batch["events"]})
    event = seen["pool_patch", first]
    assert event["operation"] == "add" and event["timestamp"] == "0.0" and event["id"].isdigit(), event
    assert event["snapshot"] == s.pool_patch.get_record(first), event
    assert batch["valid_ref_counts"]["pool_patch"] == 1, batch

    record = upload(s, patches["first"])
    assert record["status"] == "failure" and record["error_info"] == ["PATCH_ALREADY_EXISTS", patches["first"]["uuid"]], record
    record = upload(s, patches["first"], b"#!/bin/sh\n")
    assert record["status"] == "failure" and record["error_info"] == ["INVALID_PATCH"], record

    assert s.pool_patch.precheck(first, host) == 'checked <ok> & "fine"\n'
    assert s.pool_patch.apply(first, host) == "applied first\n"
    fails(["PATCH_ALREADY_APPLIED", first], s.pool_patch.apply, first, host)
    fails(["PATCH_IS_APPLIED"], s.pool_patch.destroy, first)
    one, = s.pool_patch.get_host_patches(first)
    assert s.host_patch.get_applied(one) is True and s.host.get_patches(host) == [one]
    fails(["MESSAGE_DEPRECATED"], s.host_patch.apply, one)

    second = uploaded(s, patches["second"])
    record = finished(s, getattr(s, "Async").pool_patch.pool_apply(second))
    assert (record["status"], record["result"], record["progress"]) == ("success", "<value></value>", 1.0), record
    assert s.pool_patch.get_pool_applied(second) is True
    record = finished(s, getattr(s, "Async").pool_patch.apply(second, host))
    assert (record["status"], record["error_info"]) == ("failure", ["PATCH_ALREADY_APPLIED", second]), record

    third = uploaded(s, patches["third"])
    s.pool_patch.set_other_config(third, {"a": "1"})
    s.pool_patch.add_to_other_config(third, "caf\u00e9 <&>", "\U0001f600")
    fails(["MAP_DUPLICATE_KEY", "pool_patch", "other_config", patches["third"]["uuid"], "a"], s.pool_patch.add_to_other_config, third, "a", "2")
    s.pool_patch.remove_from_other_config(third, "a")
    assert s.pool_patch.get_other_config(third) == {"caf\u00e9 <&>": "\U0001f600"}
    vdi = s.pool_patch.get_VDI(third)
    s.pool_patch.clean(third)
    s.pool_patch.clean_on_host(third, host)
    assert s.pool_patch.get_VDI(third) == vdi
    s.pool_patch.pool_clean(third)
    assert s.pool_patch.get_VDI(third) == "OpaqueRef:NULL"
    fails(["HANDLE_INVALID", "VDI", vdi], s.VDI.get_record, vdi)
    fails(["CANNOT_FIND_PATCH"], s.pool_patch.apply, third, host)
    assert uploaded(s, patches["third"]) == third
    s.VDI.destroy(s.pool_patch.get_VDI(third))
    s.pool_patch.destroy(third)
    fails(["UUID_INVALID", "pool_patch", patches["third"]["uuid"]], s.pool_patch.get_by_uuid, patches["third"]["uuid"])
    assert s.pool_patch.get_all_records_where('field "name_label"="client second"').keys() == {second}

    old = s.handle
    value(s.server.session.logout(old))
    assert len(s.pool_patch.get_all()) == 2 and s.logins == 2 and s.handle != old


def without_task(s, patch, user, password):
    """PUT without a task tells by its status; Basic needs no session."""
    url = s.url + "/pool_patch_upload"
    status, body = put(url, open(patch["file"], "rb").read(), Cookie="session_id=" + s.handle)
    assert status == 201 and json.loads(body)["uuid"] == patch["uuid"], (status, body)
    import base64
    basic = "Basic " + base64.b64encode(("%s:%s" % (user, password)).encode()).decode()
    status, body = put(url, open(patch["file"], "rb").read(), Authorization=basic)
    assert status == 409 and json.loads(body)["code"] == "PATCH_ALREADY_EXISTS", (status, body)
    status, _ = put(url, b"x")
    assert status == 401, status
    status, _ = put(s.url + "/nothing_here", b"x")
    assert status == 403, status

    # chunks, which the old API had not
    host = s.url.split("://")[1]
    make = http.client.HTTPSConnection if s.url.startswith("https") else http.client.HTTPConnection
    connection = make(host, **({"context": TLS} if s.url.startswith("https") else {}))
    data = open(patch["file"], "rb").read()
    connection.request("PUT", "/pool_patch_upload?session_id=" + s.handle, body=iter([data[:7], data[7:]]), encode_chunked=True,
                       headers={"Transfer-Encoding": "chunked"})
    assert connection.getresponse().status == 409


def legacy_events(s):
    pool, = s.pool.get_all()
    try:
        s.event.next()
    except Failure as f:
        assert f.details[0] == "SESSION_NOT_REGISTERED", f.details
    s.event.register(["pool"])
    s.event.inject("pool", pool)
    event = s.event.next()[0]
    assert (event["class"], event["operation"], event["ref"]) == ("pool", "mod", pool), event
    s.event.unregister(["pool"])
    assert s.event.get_current_id().isdigit()


plan = json.load(open(sys.argv[1]))
url, user, password = plan["url"], plan["user"], plan["password"]
logins(url, user, password)
session = Session(url, user, password, "2.5", "python")
records(session)
life(session, plan["patches"])
without_task(session, plan["patches"]["plain"], user, password)
legacy_events(session)
records(session)
assert session.task.get_all() == [t for t in session.task.get_all() if session.task.get_status(t) in ("success", "failure")]
value(session.server.session.logout(session.handle))
print("ok")
