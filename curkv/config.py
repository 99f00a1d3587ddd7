"""Everything that `curkv serve` can be told; command line, environment, file, engine and docs follow from it.

An option is a field of one of the sections. From it follow its flag (`--max-itl`), its variable
(`CURKV_MAX_ITL`), its key in a TOML file (`max_itl`), its help and its line in docs/operations.md.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from curkv.kernels import KernelsName
from curkv.kernels.formats import KV_FORMATS
from curkv.kernels.linear import WEIGHTS
from curkv.units import format_size, parse_size

VARIABLE_PREFIX = "CURKV_"

DeviceName = Literal["auto", "cpu", "cuda"]
if TYPE_CHECKING:
    Weights = str
    KVDtype = str
else:
    Weights = Literal["auto", *WEIGHTS]
    KVDtype = Literal["auto", *KV_FORMATS]


def _size(value: Any) -> Any:
    return parse_size(value) if isinstance(value, str) else value


def _parts(value: Any) -> Any:
    """Parts of a text with commas; an empty one, as of a variable that is not set, is refused."""
    parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    if isinstance(parts, list | tuple) and not all(str(part).strip() for part in parts):
        raise ValueError("a value is empty: give one, or leave the option out")
    return parts


Size = Annotated[int, BeforeValidator(_size), WithJsonSchema({"type": "integer", "format": "size"})]
Several = Annotated[tuple[str, ...], BeforeValidator(_parts)]


class Section(BaseModel):
    """Options that belong together. An option's name is its field's, behind the section's prefix."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    title: ClassVar[str]
    prefix: ClassVar[str] = ""


class EngineOptions(Section):
    """What an engine is built from."""

    title = "Model and engine"

    model: str = Field(
        default="smollm2-135m-instruct",
        description="Directory, GGUF file, Hub id, or built in: smollm2-135m-instruct, gemma-3-270m.",
    )
    text_only: bool = Field(
        default=False, description="Serve the text part of a model that sees or hears besides."
    )
    weights: Weights = Field(
        default="auto",
        description="Type of the linear layers' weights: as published on CPU, bfloat16 on a GPU, if auto; "
        "published: int4 for those published in 4 bits, int8 for others; fp8, int8: on a GPU, of products.",
    )
    kv_cache_memory: Size | None = Field(
        default=None,
        gt=0,
        description="Memory for the KV cache, e.g. 2GiB; a share of free memory if not given.",
    )
    prefix_cache_memory: Size | None = Field(
        default=None,
        ge=0,
        description="Most of it held for repeated prompts, 0 for none; an eighth if not given.",
    )
    prefix_cache: Literal["generated", "exact"] = Field(
        default="generated",
        description="What is held: answers too, or prompts alone, so that reuse changes no bit of an answer.",
    )
    session_ttl: float = Field(
        default=3600.0, gt=0, description="Seconds after its last use at which a session is dropped."
    )
    prefix_store: Path | None = Field(
        default=None, description="Directory where prefixes and sessions outlive the process; may be shared."
    )
    prefix_store_size: Size = Field(
        default=8 * 1024**3, gt=0, description="Most bytes in it; the least recently used go."
    )
    kv_dtype: KVDtype = Field(
        default="auto",
        description="Type of cached K, V: int8 on CPU (float16 beside float32 weights), bfloat16 on a GPU, "
        "if auto; k8v4: int8 keys, values of 4 bits in groups of 32; int4: both; fp8: on GPUs that have it.",
    )
    page_size: int = Field(default=64, ge=8, le=256, description="Tokens of one KV head per page.")
    max_step_tokens: int | None = Field(
        default=None,
        ge=16,
        description="Most tokens per step, longer prompts go in chunks; 512 on CPU, 2048 on a GPU if not "
        "given.",
    )
    max_itl: float | None = Field(
        default=None,
        gt=0,
        description="Seconds that a step with running requests may take; prompt chunks are sized to it.",
    )
    max_sequences: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Most sequences in flight at once; 64 if not given, on a GPU up to 256 if its cache "
        "holds 2,048 tokens of each.",
    )
    max_model_len: int | None = Field(
        default=None, ge=16, description="Most tokens of prompt + output; the model's."
    )
    device: DeviceName = Field(
        default="auto", description="Where the model runs; cuda is any GPU that torch knows, AMD's too."
    )
    kernels: KernelsName = Field(default="auto", description="Implementation of the kernels.")
    threads: int | None = Field(
        default=None,
        ge=1,
        description="CPU threads; one for each core that the process may use if not given.",
    )
    tensor_parallel: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Processes that share the model, each with its part of the heads; on GPUs one for each.",
    )


class ServerOptions(Section):
    """Where and to whom the server speaks."""

    title = "Server"

    served_model_name: Several = Field(
        default=(), description="Name in the API, repeatable; the model's own if not given."
    )
    any_model: bool = Field(
        default=False, description="Answer requests whatever model they name, as llama.cpp does."
    )
    host: str = Field(
        default="127.0.0.1", description="Address to listen on; 0.0.0.0 opens it to the network."
    )
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    api_key: Several = Field(
        default=(),
        description="Key that a request must present; repeatable, or separated by commas.",
        repr=False,
    )
    api_key_file: Path | None = Field(
        default=None,
        description="File of further keys, a line each: NAME KEY or NAME sha256:DIGEST.",
    )
    metrics_port: int | None = Field(
        default=None, ge=1, le=65535, description="Port for /metrics, which the other then has not."
    )
    cors_origin: Several = Field(
        default=(), description="Web page origin that may use the API from a browser, * for any; repeatable."
    )
    ssl_certfile: Path | None = Field(
        default=None, description="Certificate; with it the server speaks HTTPS."
    )
    ssl_keyfile: Path | None = Field(default=None, description="Private key of the certificate.")
    vllm_metrics: bool = Field(
        default=False, description="Also emit the gauges that routers read under vLLM's names."
    )
    log_format: Literal["text", "json"] = Field(default="text", description="Form of a line of the log.")
    otlp_traces_endpoint: str | None = Field(
        default=None,
        description="URL of a collector that gets OpenTelemetry spans; needs curkv[otel].",
    )


class Limits(Section):
    """What a request may cost the server."""

    title = "Limits"

    max_body_size: Size = Field(
        default=8 * 1024**2, gt=0, description="Bytes of the largest request body; above it a 413."
    )
    max_body_values: int = Field(
        default=2**18,
        ge=1,
        description="Values in the JSON of a request body, such as token ids; above it a 413.",
    )
    max_waiting: int = Field(default=1024, ge=1, description="Most sequences in the queue; above it a 429.")
    max_waiting_tokens: int = Field(
        default=2**20, ge=1, description="Most prompt tokens in the queue; above it a 429."
    )
    max_waiting_per_key: int | None = Field(
        default=None, ge=1, description="Most sequences in the queue of one API key; above it a 429."
    )
    structure_timeout: float = Field(
        default=5.0,
        gt=0,
        description="Seconds that a schema or expression may take to compile; above it a 400.",
    )
    request_timeout: float | None = Field(
        default=None,
        gt=0,
        description="Seconds after which a request is ended with a 408; none if not given.",
    )
    max_stored_responses: Size = Field(
        default=16 * 1024**2,
        ge=0,
        description="Text of /v1/responses kept for each API key; 0 keeps none.",
    )
    receive_timeout: float = Field(
        default=30.0,
        gt=0,
        description="Seconds in which a request's header, and then its body, have to arrive.",
    )
    drain_timeout: float = Field(
        default=30.0, ge=0, description="Seconds that running requests may take to finish after SIGTERM."
    )


class KVDefaults(Section):
    """What requests get that say nothing about their cache."""

    title = "Requests that do not say what to keep"
    prefix = "kv_"

    policy: str = Field(default="full", description="Eviction policy of requests that name none.")
    budget: str | None = Field(
        default=None, description="Budget of requests that name none: 25%, 512tok, 8MiB."
    )
    decode_budget: str | None = Field(default=None, description="Decode budget of requests that name none.")


class Settings(BaseModel):
    """All sections. Made from the options' own names too: `Settings(port=8001, kv_budget="25%")`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: EngineOptions = EngineOptions()
    server: ServerOptions = ServerOptions()
    limits: Limits = Limits()
    kv: KVDefaults = KVDefaults()

    @property
    def model_name(self) -> str:
        """The name under which the API serves the model; the first, if there are several."""
        return self.model_names[0]

    @property
    def model_names(self) -> tuple[str, ...]:
        """All names under which the API serves the model."""
        return self.server.served_model_name or (self.engine.model,)

    @model_validator(mode="before")
    @classmethod
    def _sort(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Puts options into their sections."""
        sections: dict[str, Any] = {
            name: value for name, value in given.items() if isinstance(value, Section)
        }
        for name in given.keys() - sections.keys():
            if name not in OPTIONS:
                raise ValueError(f"there is no option {name}")
            option = OPTIONS[name]
            sections.setdefault(option.section, {})[option.field] = given[name]
        return sections

    @classmethod
    def load(cls, file: Path | None = None, **given: Any) -> Settings:
        """Merges what was given on the command line, the environment and a TOML file, in this order.

        Args:
            file: TOML file with options at its top level.
            **given: options set explicitly; None and [] count as not given.

        Raises:
            pydantic.ValidationError: an option is unknown or has a bad value.
            OSError: the file cannot be read.
            tomllib.TOMLDecodeError: the file is no TOML.
        """
        lowest = {} if file is None else tomllib.loads(file.read_text())
        explicit = {name: value for name, value in given.items() if value not in (None, [])}
        return cls(**(lowest | _from_environment(os.environ) | explicit))


@dataclass(frozen=True, slots=True)
class Option:
    """A field of a section, and what is derived from it.

    Attributes:
        name: in files, and in `Settings.load`.
        section: name of the field of `Settings` that holds it.
        group: that section's title.
        field: its name in there.
        schema: its JSON schema; of an optional value, that of the value.
        default: None if nothing has to be given.
        description: one sentence.
    """

    name: str
    section: str
    group: str
    field: str
    schema: Mapping[str, Any]
    default: Any
    description: str

    @property
    def flag(self) -> str:
        """On the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """In the environment."""
        return VARIABLE_PREFIX + self.name.upper()

    @property
    def default_text(self) -> str | None:
        """As a user would write it; None if the option is left out by default."""
        if self.default in (None, ()):
            return None
        if self.schema.get("format") == "size":
            return format_size(self.default)
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)


def _options() -> dict[str, Option]:
    options = {}
    for section, field in Settings.model_fields.items():
        kind: Any = field.annotation
        schemas = kind.model_json_schema()["properties"]
        for name, info in kind.model_fields.items():
            schema = schemas[name]
            schema = next(iter(schema.get("anyOf", [])), schema)
            full = kind.prefix + name
            assert info.description is not None
            options[full] = Option(full, section, kind.title, name, schema, info.default, info.description)
    return options


OPTIONS: dict[str, Option] = _options()
"""Every option by its name."""


def _from_environment(environment: Mapping[str, str]) -> dict[str, str]:
    return {o.name: environment[o.variable] for o in OPTIONS.values() if o.variable in environment}
