// All talk with the server. Another engine may stand behind the same interface:
// capabilities(), controls(form), draw(form, signal), stream(form, signal), edit(form, edit, image, signal), cancel(id).
// A form has the fields of POST /v1/pictures; images are base64 without the data: prefix.

export class ClientError extends Error {
  constructor(status, body, retryAfter) {
    const about = body?.error ?? body ?? {};
    super(about.message || "the server cannot be reached; start it again with car-run serve");
    this.status = status;
    this.code = about.code ?? "unreachable";
    this.retryAfter = retryAfter;
  }
}

// The events of an edit; a result that the client no longer keeps is sent as an image.
export async function* edited(client, form, edit, image, signal) {
  try {
    yield* client.stream({ ...form, edit }, signal);
  } catch (error) {
    if (error.status !== 404 || !image) throw error;
    const { id: _, index: __, ...how } = edit;
    yield* client.stream({ ...form, edit: { ...how, image } }, signal);
  }
}

export class HttpClient {
  async capabilities() {
    return (await this.#send("v1/capabilities", {})).json();
  }

  // {photo | control, fit, invert} → {control, type, size, warnings}
  async controls(form) {
    return (await this.#send("v1/controls", this.#post(form))).json();
  }

  // All at once: {id, images: [{seed, png, receipt}], warnings, timings}.
  async draw(form, signal) {
    return (await this.#send("v1/pictures", this.#post(form, signal))).json();
  }

  // Events as they come: {type: "queued" | "scale" | "picture" | "done", …}. Leaving the loop cancels. An engine may send the
  // preview of a scale after the scale itself, as {type: "preview", image, index, preview}.
  async *stream(form, signal) {
    const post = this.#post(form, signal);
    post.headers.Accept = "text/event-stream";
    const answer = await this.#send("v1/pictures", post);
    for await (const event of events(answer.body)) {
      if (event.type === "error") throw new ClientError(event.status, event);
      yield event;
    }
  }

  // edit: {id, index} or {image}, with {scale}, {mask} or {frame}.
  edit(...given) {
    return edited(this, ...given);
  }

  async cancel(id) {
    await this.#send(`v1/pictures/${encodeURIComponent(id)}`, { method: "DELETE" });
  }

  #post(form, signal) {
    return { method: "POST", signal, headers: { "Content-Type": "application/json" }, body: JSON.stringify(form) };
  }

  async #send(path, options) {
    let answer;
    try {
      answer = await fetch(path, options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ClientError(0, null);
    }
    if (answer.ok) return answer;
    const body = await answer.json().catch(() => null);
    throw new ClientError(answer.status, body, Number(answer.headers.get("Retry-After")) || undefined);
  }
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      text += value;
      const parts = text.split("\n\n");
      text = parts.pop();
      for (const part of parts) {
        const type = /^event: (.*)$/m.exec(part)?.[1];
        const data = /^data: (.*)$/m.exec(part)?.[1];
        if (type && data) yield { ...JSON.parse(data), type };
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
