"""The page `/docs`: every route of the OpenAPI document with its fields, responses and examples, without scripts."""

from html import escape
from typing import Any

URL = "http://127.0.0.1:8000"  # of the examples
CHAT = """{"model": "addressvlm", "max_tokens": 32, "messages": [{"role": "user", "content": [
  {"type": "text", "text": "Which street is this?"},
  {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,'$(base64 -w0 photo.jpg)'"}}]}]}"""
PYTHON_CHAT = f"""import base64
from openai import OpenAI

client = OpenAI(base_url="{URL}/v1", api_key="none")
photo = "data:image/jpeg;base64," + base64.b64encode(open("photo.jpg", "rb").read()).decode()
content = [
    {{"type": "text", "text": "Which street is this?"}},
    {{"type": "image_url", "image_url": {{"url": photo}}}},
]
chat = client.chat.completions.create(
    model="addressvlm", messages=[{{"role": "user", "content": content}}], max_tokens=32
)
print(chat.choices[0].message.content)"""
PYTHON_LOCALIZE = f"""import httpx

with open("photo.jpg", "rb") as photo:
    answer = httpx.post("{URL}/v1/localize", files={{"file": photo}}, data={{"top_k": 3}}, timeout=60).json()
for candidate in answer["candidates"]:
    print(candidate["street"], candidate["district"], candidate["probability"])"""


def examples(method: str, path: str) -> list[dict[str, str]]:
    """Examples in the OpenAPI extension `x-codeSamples`: a command line with curl, and a Python program."""
    if path == "/v1/localize":
        curl, python = f"curl -F file=@photo.jpg -F top_k=3 {URL}{path}", PYTHON_LOCALIZE
    elif method == "post":
        curl, python = f"echo '{CHAT}' |\n  curl -H 'Content-Type: application/json' -d @- {URL}{path}", PYTHON_CHAT
    else:
        path = path.replace("{model}", "addressvlm").replace("{number}", "0")
        body, save = {"/metrics": ("text", ""), "/v1/samples/0": ("content", " -o sample.jpg")}.get(path, ("json()", ""))
        curl, python = f"curl{save} {URL}{path}", f'import httpx\n\nprint(httpx.get("{URL}{path}").{body})'
    return [{"lang": "curl", "source": curl}, {"lang": "Python", "source": python}]


def render(document: dict[str, Any]) -> str:
    """The document as HTML."""
    schemas = document["components"]["schemas"]
    operations = [
        (path, method, operation) for path, methods in document["paths"].items() for method, operation in methods.items()
    ]
    links = "".join(f'<li><a href="#{o["operationId"]}">{method.upper()} {escape(path)}</a>' for path, method, o in operations)
    sections = "".join(_section(path, method, operation, schemas) for path, method, operation in operations)
    keys = "<p>Send a key as <code>Authorization: Bearer …</code>.</p>" if "securitySchemes" in document["components"] else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>AddressVLM: the HTTP API</title>
<link rel="stylesheet" href="page.css"></head>
<body class="docs"><header><div><h1>The HTTP API</h1><p>{escape(document["info"]["description"])}
<a href="./">The page</a> · <a href="openapi.json">openapi.json</a></p></div></header>
<main>{keys}<nav><ul>{links}</ul></nav>{sections}</main></body></html>
"""


def _section(path: str, method: str, operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    samples = "".join(
        f"<h3>{escape(sample['lang'])}</h3><pre><code>{escape(sample['source'])}</code></pre>"
        for sample in operation["x-codeSamples"]
    )
    parameters = {p["name"]: p["schema"] | {"description": f"in the {p['in']}"} for p in operation.get("parameters", [])}
    fields = _fields("Parameters", parameters, []) if parameters else ""
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        schema = _resolve(content["schema"], schemas)
        fields += _fields(f"Fields as {kind}", _with_nested(schema["properties"], schemas), schema.get("required", []))
    answers = "".join(
        f"<tr><td>{status}<td>{escape(answer['description'])}" for status, answer in sorted(operation["responses"].items())
    )
    return (
        f'<section id="{operation["operationId"]}"><h2><code>{method.upper()}</code> {escape(path)}</h2>'
        f"<p>{escape(operation['description'])}</p>{samples}{fields}<h3>Responses</h3><table>{answers}</table></section>"
    )


def _fields(title: str, fields: dict[str, Any], required: list[str]) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code>{' (required)' if name in required else ''}<td>{escape(_type(schema))}"
        f"<td>{escape(schema.get('description', ''))}"
        for name, schema in fields.items()
    )
    return f"<h3>{escape(title)}</h3><table>{rows}</table>"


def _with_nested(fields: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """The fields, an object or a list of objects followed by its own fields, such as `prior.districts`."""
    shown = {}
    for name, schema in fields.items():
        shown[name] = schema
        for option in schema.get("anyOf", [schema]):
            if "$ref" in (item := option.get("items", option)):
                nested = _with_nested(_resolve(item, schemas)["properties"], schemas)
                shown |= {f"{name}.{key}": value for key, value in nested.items()}
    return shown


def _resolve(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    return schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def _type(schema: dict[str, Any]) -> str:
    """A schema in a few words: `integer, 1 to 50`, `list of string`."""
    if "$ref" in schema:
        return "object"
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(_type(option) for option in options if option.get("type") != "null"))
    if "const" in schema or "enum" in schema:
        return " or ".join(map(str, schema.get("enum", [schema.get("const")])))
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}" if schema.get("items") else "list"
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    kind = str(schema.get("type", "any"))
    if (low, high) == (None, None):
        return kind
    return f"{kind}, {'…' if low is None else low} to {'…' if high is None else high}"
