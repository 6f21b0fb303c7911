"""Those who use the admin API, each with their own token, and a policy service without an Envoy before it."""

import json

from harness import Stack, call


class Service(Stack):
    """The policy service alone: what the admin API does needs no more."""

    def __enter__(self):
        try:
            self.start_service()
        except BaseException:
            self.__exit__(RuntimeError)
            raise
        return self

    def restart(self):
        self.service.terminate()
        self.start_service()

    def files(self):
        """Every byte that the service keeps, by file."""
        return {path.name: path.read_bytes() for path in (self.directory / "data").iterdir()}


class Person:
    """One holder of an admin token."""

    def __init__(self, stack, token):
        self.stack, self.token = stack, token

    def ask(self, method, path, body=None, **headers):
        """Status, headers, body as JSON (or as text, where it is none). Header names are written with _ for -."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.token is not None:
            headers["authorization"] = f"Bearer {self.token}"
        status, headers, data = call(self.stack.admin_base, method, path, body, headers)
        if "json" in headers.get("content-type", "") and "jsonl" not in headers["content-type"]:
            return status, headers, json.loads(data)
        return status, headers, data.decode() if data else None

    def do(self, method, path, body=None, **headers):
        """The body of an answer that is no error."""
        status, _, data = self.ask(method, path, body, **headers)
        assert status < 300, (method, path, status, data)
        return data

    def etag(self, path):
        return self.ask("GET", path)[1]["etag"]

    def pages(self, path, limit, between=lambda: None):
        """All items of a list, read page by page; between() runs after each page."""
        items, cursor, mark = [], None, "&" if "?" in path else "?"
        while True:
            page = self.do("GET", f"{path}{mark}limit={limit}" + (f"&cursor={cursor}" if cursor else ""))
            assert len(page["data"]) <= limit
            items += page["data"]
            cursor = page.get("next_cursor")
            if cursor is None:
                return items
            assert len(page["data"]) == limit, "only the last page may be short"
            between()


def admin(stack):
    return Person(stack, stack.admin_token)


def person(stack, role, team=None, **more):
    """Somebody new of the stack's own organisation."""
    return Person(stack, admin(stack).do("POST", "/v1/admin-tokens", {"role": role, **({"team": team} if team else {}), **more})["token"])


def organisation(stack, name):
    """The first administrator of a new organisation."""
    return Person(stack, admin(stack).do("POST", "/v1/organisations", {"id": name, "label": name})["token"])
