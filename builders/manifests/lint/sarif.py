"""Findings as SARIF 2.1.0, which code scanning shows beside the file: docs.oasis-open.org/sarif/sarif/v2.1.0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from builders.manifests.lint.objects import Finding
from builders.manifests.lint.severities import SEVERITIES

Places = Mapping[str, tuple[str, int]]  # an object's title -> its file and line


def sarif(findings: Sequence[Finding], places: Places) -> dict[str, Any]:
    """One run. A finding without an object in `places` is about the file that it names."""
    rules = [
        {"id": rule, "defaultConfiguration": {"level": severity}}
        for rule, severity in sorted(SEVERITIES.items())
        if any(finding.rule == rule for finding in findings)
    ]
    driver = {"name": "trireme lint-manifests", "rules": rules}
    run = {"tool": {"driver": driver}, "results": [_result(finding, places) for finding in findings]}
    return {"$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0", "runs": [run]}


def _result(finding: Finding, places: Places) -> dict[str, Any]:
    file, line = places.get(finding.object, (finding.object, 1))
    said = f"{finding.object} {finding.path}: got {finding.got}; expected {finding.expected}. Fix: {finding.fix}"
    where = {"artifactLocation": {"uri": file}, "region": {"startLine": line}}
    name = {"fullyQualifiedName": f"{finding.object} {finding.path}"}
    return {
        "ruleId": finding.rule,
        "level": finding.severity,
        "message": {"text": said},
        "locations": [{"physicalLocation": where, "logicalLocations": [name]}],
    }
