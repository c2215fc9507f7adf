"""Steps as Prefect tasks, and what surrounds them: data versions, tracking, reports, servers."""

from __future__ import annotations

from tasks.environment import prepare

prepare()
