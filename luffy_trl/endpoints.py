# Copyright 2026 The luffy-trl authors. Licensed under the Apache License, Version 2.0.

"""Endpoints that speak OpenAI's protocol: what goes with a request, and what is told of an answer."""

import netrc
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from .redaction import Redactor, basic_auth, credentials_of, without_credentials


# The last one tells the client itself to leave the answer as it is
_HEADERS = "accept(-encoding)?|connection|content-(length|type)|cookie|host|user-agent|x-stainless-raw-response"


class Endpoint:
    """
    An address up to `/v1`, with a key, or a login in the address or in `~/.netrc`. The client alone would send the key
    and headers of its own environment variables (`OPENAI_API_KEY`, ...) to any endpoint, and follow redirects.
    """

    def __init__(self, base_url: str, key: str = "", use_netrc: bool = False):
        self.address = without_credentials(base_url)
        login = credentials_of(base_url)
        if not login and use_netrc:
            login = basic_auth(*_find_login(urlsplit(base_url).hostname))
        self.hide = Redactor(key, *login)
        self._authorization = f"Basic {login[1]}" if login else f"Bearer {key}" if key else None

    def client_options(self, timeout: float, max_retries: int) -> dict[str, Any]:
        """Options of `openai.OpenAI` and `openai.AsyncOpenAI`, to which [`Endpoint.http_options`] belong."""
        from openai import Timeout

        # A key is required, and taken out again
        options = {"base_url": self.address, "api_key": "none", "max_retries": max_retries}
        return {**options, "timeout": Timeout(timeout, connect=min(timeout, 30.0))}

    @property
    def http_options(self) -> dict[str, Any]:
        """Options of the client's `http_client`."""
        return {"auth": self._authorize, "follow_redirects": False}

    def _authorize(self, request):
        for name in list(request.headers):
            if not re.fullmatch(_HEADERS, name, re.IGNORECASE):
                del request.headers[name]
        if self._authorization:
            request.headers["Authorization"] = self._authorization
        return request

    def redirection(self, response) -> str | None:
        """Where a response redirects to, without credentials; empty where that is no address."""
        if not (response.is_redirect and "location" in response.headers):
            return None
        try:
            return self.hide(without_credentials(urljoin(str(response.url), response.headers["location"])))
        except ValueError:
            return ""


def _find_login(host: str) -> tuple[str, str]:
    """User and password of a host in `~/.netrc`, empty if there are none."""
    try:
        login = netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc").authenticators(host)
    except (OSError, netrc.NetrcParseError):
        login = None
    return (login[0] or "", login[2] or "") if login else ("", "")
