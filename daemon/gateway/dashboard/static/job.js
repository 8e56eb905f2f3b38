// One job: where it stands, its curve, why it failed and what to do, its answers before and after, its story,
// what was asked for, its files; cancel and retry.

import { el, say, mark, plain, KeyedList } from "./dom.js";
import { lossChart } from "./chart.js";
import { state, watch, watchStory, now, secondsSince, ask } from "./store.js";
import { wayWords, leftWords } from "./overview.js";
import { confirmed } from "./confirm.js";
import * as f from "./format.js";

const FINAL = ["completed", "failed", "cancelled"];
const FILES = {
  archive: "The whole adapter (tar.gz)",
  adapter_model: "Adapter weights",
  adapter_config: "Adapter configuration",
  training_logs: "Training log",
  metrics_chart: "Loss chart (PNG)",
  manifest: "Manifest: sizes, hashes, versions",
};

/** Build the page of a job into an element; returns how to end it. */
export function jobPage(view, id) {
  let whole = null;
  let ended = false;
  let reading = false;
  const chart = lossChart();
  const page = layout(chart);
  view.replaceChildren(page.element);
  mark(view, "aria-busy", "true");
  page.cancel.addEventListener("click", () => move("cancel"));
  page.retry.addEventListener("click", () => move("retry"));

  async function read() {
    if (reading) return;
    reading = true;
    try {
      const told = await ask(`/dashboard/jobs/${encodeURIComponent(id)}`);
      if (ended) return;
      whole = told;
      whole.readAt = now();
      whole.tail = tailOf(whole.curve.points);
      mark(view, "aria-busy", "false");
      show();
      page.story.show(whole.story);
      page.samples.show(whole.story);
      page.spec(whole.job, whole.settings);
      page.files(id, whole.job);
      chart.update(whole.curve, whole.job.total_steps);
      show();
    } catch (error) {
      if (ended) return;
      mark(view, "aria-busy", "false");
      if (!whole) view.replaceChildren(back(), el("p", { class: "empty", text: error.message }));
    } finally {
      reading = false;
    }
  }

  function job() {
    const live = state.jobs.get(id);
    const read = whole.job;
    const left = f.isNumber(read.seconds_left) ? new Date(whole.readAt + read.seconds_left * 1000).toISOString() : null;
    if (!live) return { estimated_completion_at: left, dataset: read.dataset_name, ...read };
    // The stream's line is newer; the page's own words on an error are longer.
    const same = live.error_code === read.error_code && live.attempt === read.attempt;
    return { ...read, ...live, ...(same ? { error_message: read.error_message, error_hint: read.error_hint } : {}) };
  }

  let before = null;
  function show() {
    if (!whole) return;
    const current = job();
    // An ending brings its files, stack and hashes; a new attempt its own curve.
    const standing = `${current.state} ${current.attempt}`;
    if (before !== null && standing !== before) setTimeout(read, 50);
    before = standing;
    page.show(current, whole.job);
    document.title = plain(`${f.shortModel(current.model)} ${current.state} · brightrun trainer`);
  }

  function hear(news) {
    if (news.anew) {
      read();
      return;
    }
    if (!whole) return;
    const lines = (news.story ?? []).filter((event) => event.job_id === id);
    const known = new Set(whole.story.map((event) => event.id));
    const fresh = lines.filter((event) => !known.has(event.id));
    if (fresh.some((event) => event.cut || event.kind === "resumed")) read();
    else if (fresh.length) {
      whole.story.push(...fresh);
      page.story.show(whole.story);
      page.samples.show(whole.story);
    }
    let grown = false;
    for (const name of ["points", "validation"]) {
      const last = whole.curve[name].at(-1)?.[0] ?? -1;
      const more = (news[name]?.[id] ?? []).filter(([step]) => step > last);
      if (name === "points") whole.tail.add(more);
      else whole.curve[name].push(...more);
      grown = grown || more.length > 0;
    }
    if (grown) chart.update(whole.curve, job().total_steps);
  }

  async function move(verb) {
    const current = job();
    const model = f.shortModel(current.model);
    const question =
      verb === "cancel"
        ? {
            title: "Cancel this job?",
            words: `${model} is ${current.state}. Its training ends now and cannot be taken up by itself; a checkpoint is kept for a retry.`,
            yes: "Cancel the job",
            no: "Let it run",
          }
        : {
            title: "Try this job again?",
            words: `${model} goes back to the queue with all its attempts, and from its last checkpoint where there is one.`,
            yes: "Try again",
            no: "Leave it",
          };
    await confirmed(question, () => ask(`/dashboard/jobs/${encodeURIComponent(id)}/${verb}`, { method: "POST" }));
  }

  const stop = [watch(show), watchStory(hear)];
  read();
  return () => {
    ended = true;
    stop.forEach((end) => end());
    chart.end();
    document.title = "brightrun trainer";
  };
}

/** Takes live steps in the measure of the stored points: each of those is the mean of the steps since the one before. */
function tailOf(points) {
  const every = points.length > 2 ? Math.max(points.at(-1)[0] - points.at(-2)[0], points[2][0] - points[1][0]) : 1;
  let from = points.at(-1)?.[0] ?? 0;
  let since = [];
  return {
    add(steps) {
      for (const [step, loss] of steps) {
        if (since.length) points.pop();
        since.push(loss);
        points.push([step, since.reduce((a, b) => a + b, 0) / since.length]);
        if (step - from < every) continue;
        from = step;
        since = [];
      }
    },
  };
}

const back = () => el("a", { class: "back", href: "#/", text: "← Overview" });

function layout(chart) {
  const title = el("h1");
  const status = el("span", { class: "state large" });
  const about = el("p", { class: "muted about" });
  const cancel = el("button", { type: "button", id: "cancel", class: "danger", text: "Cancel", hidden: true });
  const retry = el("button", { type: "button", id: "retry", text: "Try again", hidden: true });
  const bar = el("progress", { max: 100, "aria-label": "progress" });
  const way = el("span", { class: "muted" });
  const wayRow = el("div", { class: "way wide" }, bar, way);
  const facts = el("dl", { class: "facts" });
  const factList = new KeyedList(facts, () => {
    const name = el("dt");
    const value = el("dd");
    return {
      element: el("div", {}, name, value),
      update([label, text]) {
        say(name, label);
        say(value, text);
      },
    };
  });
  const fault = faultBox();
  const samples = sampleBox();
  const story = storyBox();
  const settingRows = el("tbody");
  const settingPart = part("Settings", settingTable(settingRows));
  const specList = el("dl", { class: "pairs" });
  const specPart = part("Asked for", specList);
  const fileList = el("ul", { class: "files" });
  const filePart = part("Files", fileList);
  filePart.hidden = true;
  const chartPart = part("Loss", chart.element);
  const stack = el("pre", { tabindex: "0" });
  const stackPart = el("details", { class: "part", hidden: true }, el("summary", { text: "For the operator: the stack" }), stack);
  const element = el(
    "article",
    { class: "job" },
    back(),
    el("header", {}, el("div", {}, el("div", { class: "title" }, title, status), about), el("div", { class: "buttons" }, retry, cancel)),
    fault.element,
    wayRow,
    facts,
    chartPart,
    samples.element,
    el("div", { class: "columns" }, story.element, el("div", {}, filePart, settingPart, specPart, stackPart)),
  );

  return {
    element,
    cancel,
    retry,
    story,
    samples,
    show(job, read) {
      mark(element, "data-state", job.state);
      say(title, f.shortModel(job.model));
      say(status, job.state);
      mark(status, "data-state", job.state);
      say(about, [job.model ?? "the service's default model", job.dataset ?? read.dataset_name, job.job_id].filter(Boolean).join(" · "));
      cancel.hidden = FINAL.includes(job.state);
      retry.hidden = !["failed", "cancelled"].includes(job.state);
      fault.show(job);
      wayRow.hidden = FINAL.includes(job.state) || job.state === "queued";
      bar.value = job.progress;
      say(way, wayWords(job));
      factList.show(factsOf(job, read), ([name]) => name);
      chartPart.hidden = chart.isEmpty() && (FINAL.includes(job.state) || job.state === "queued");
    },
    spec(read, settings) {
      settingPart.hidden = !settings.length;
      settingRows.replaceChildren(
        ...settings.map(([name, asked, used]) =>
          el("tr", {}, el("th", { scope: "row", text: name }), el("td", { text: asked }), el("td", { text: used })),
        ),
      );
      const chosen = isRecord(read.hyperparameters) ? read.hyperparameters : { hyperparameters: read.hyperparameters };
      const pairs = [
        // Above, beside what is used, as soon as that is known.
        ...(settings.length ? [] : Object.entries(chosen)),
        ...Object.entries(isRecord(read.gpu_config) ? read.gpu_config : { gpu_config: read.gpu_config }).filter(
          ([name]) => !settings.length || !["gpu_type", "type", "num_gpus", "count"].includes(name),
        ),
        ["dataset", read.dataset_source],
        ["owner", read.user_id],
        ["caller's id", read.client_job_id],
        ["priority", read.priority || null],
        ["preset", read.preset_id],
        ["deadline", read.deadline_at ? f.clock(read.deadline_at) : null],
        ["at most", f.isNumber(read.max_cost) ? f.money(read.max_cost) : null],
      ].filter(([, value]) => value !== null && value !== undefined && value !== "");
      specList.replaceChildren(
        ...pairs.map(([name, value]) => el("div", {}, el("dt", { text: name }), el("dd", { text: f.words(value) }))),
      );
      stackPart.hidden = !read.error_stack;
      say(stack, f.words(read.error_stack));
    },
    files(id, read) {
      const stored = read.state === "completed" && isRecord(read.result?.artifacts) ? read.result.artifacts : {};
      const names = Object.keys(stored).filter((name) => /^[a-z_]{1,40}$/.test(name));
      names.sort((a, b) => (a === "archive" ? -1 : b === "archive" ? 1 : a.localeCompare(b)));
      filePart.hidden = !names.length;
      fileList.replaceChildren(
        ...names.map((name) =>
          el(
            "li",
            {},
            el("a", {
              href: `/dashboard/jobs/${encodeURIComponent(id)}/files/${name}`,
              download: true,
              text: Object.hasOwn(FILES, name) ? FILES[name] : name,
            }),
            name === "archive" && read.adapter_bytes ? el("span", { class: "muted", text: ` ${f.size(read.adapter_bytes)}` }) : null,
            name === "archive" && read.adapter_sha256 ? el("code", { text: `sha256 ${f.words(read.adapter_sha256)}` }) : null,
          ),
        ),
      );
    },
  };
}

const isRecord = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

function part(title, ...children) {
  return el("section", { class: "part" }, el("h2", { text: title }), ...children);
}

/** What was asked for beside what it is trained with. */
function settingTable(rows) {
  const names = ["setting", "asked", "used"];
  const head = el("tr", {}, ...names.map((text) => el("th", { scope: "col", text })));
  return el("table", { class: "settings" }, el("thead", {}, head), rows);
}

function factsOf(job, read) {
  const facts = [];
  const fact = (name, value) => value && value !== "–" && facts.push([name, value]);
  const order = state.queue.order.find(([id]) => id === job.job_id);
  if (job.state === "queued") {
    fact("waits because", order ? order[1] : "it is new");
    if (job.run_after) fact("not before", f.clock(job.run_after));
  }
  const metric = (name) => f.metric(job, name);
  if (!["queued"].includes(job.state)) {
    fact("loss", f.loss(metric("training_loss")));
    fact("held out", f.loss(metric("validation_loss")));
    if (job.state === "running") fact("tokens a second", f.count(metric("throughput")));
    if (job.total_steps) fact("step", `${f.count(job.step)} of ${f.count(job.total_steps)}`);
    if (job.total_epochs) fact("epoch", `${f.count(Math.min(job.epoch + (FINAL.includes(job.state) ? 0 : 1), job.total_epochs))} of ${f.count(job.total_epochs)}`);
  }
  if (["running", "initializing"].includes(job.state)) {
    const used = metric("gpu_memory_used_gib");
    const heat = metric("gpu_temperature_celsius");
    fact("GPU", metric("gpu_utilization") === null ? "" : f.percent(metric("gpu_utilization")));
    fact("GPU memory", used === null ? "" : `${used.toFixed(1)} GiB`);
    fact("GPU heat", heat === null ? "" : `${Math.round(heat)} °C`);
    fact("left", leftWords(job));
  }
  fact("cost", f.isNumber(job.cost) && (job.cost > 0 || job.state !== "queued") ? f.money(job.cost) : "");
  fact("attempt", job.attempt ? `${job.attempt} of ${job.max_attempts}` : "");
  const host = state.workers.find((worker) => worker.worker_id === job.worker_id);
  fact("host", host ? host.host : "");
  fact("queued", f.clock(job.queued_at));
  if (job.started_at) fact("waited", f.span((Date.parse(job.started_at) - Date.parse(job.queued_at)) / 1000));
  if (job.started_at) fact("ran", f.span(((job.completed_at ? Date.parse(job.completed_at) : now()) - Date.parse(job.started_at)) / 1000));
  if (job.completed_at) fact("ended", f.ago(secondsSince(job.completed_at)));
  for (const each of job.deliveries ?? read.deliveries ?? []) fact(f.words([each.kind, each.target].filter(Boolean).join(" ")), deliveryWords(each));
  return facts;
}

function deliveryWords(delivery) {
  const { state, result } = delivery;
  if (state !== "done") {
    const words = [delivery.error_message, delivery.error_hint].filter(Boolean).map(f.words).join(" ");
    return words ? `${f.words(state)}: ${words}` : f.words(state);
  }
  // The path is long, and the same for each up to its end: `download --export` finds it.
  const where = result?.url ?? result?.model ?? (f.isNumber(result?.bytes) ? f.size(result.bytes) : "");
  return where ? `done: ${f.words(where)}` : "done";
}

function faultBox() {
  const code = el("code");
  const message = el("p", { class: "message" });
  const hint = el("p", { class: "hint" });
  const earlier = el("p", { class: "muted", text: "That was an earlier attempt; the job goes on." });
  const element = el("section", { class: "fault-box", hidden: true, "aria-label": "What went wrong" }, code, message, hint, earlier);
  return {
    element,
    show(job) {
      element.hidden = !job.error_message;
      mark(element, "data-state", job.state);
      say(code, f.words(job.error_code) || "error");
      const [happened, advice] = [f.words(job.error_message), f.words(job.error_hint)];
      // The message says what to do as well, for pages that show it alone.
      say(message, advice && happened.endsWith(advice) ? happened.slice(0, -advice.length).trimEnd() : happened);
      say(hint, advice ? `What to do: ${advice}` : "");
      hint.hidden = !job.error_hint;
      earlier.hidden = FINAL.includes(job.state);
    },
  };
}

function sampleBox() {
  const list = el("div", { class: "samples" });
  const element = part("Answers before and after training", list);
  element.hidden = true;
  return {
    element,
    show(story) {
      const answers = new Map();
      for (const event of story) {
        if (event.kind !== "sample") continue;
        const prompt = f.words(event.data.prompt);
        if (!answers.has(prompt)) answers.set(prompt, new Map());
        answers.get(prompt).set(f.words(event.data.when), f.words(event.data.answer));
      }
      element.hidden = !answers.size;
      const answer = (by, when) =>
        el("div", {}, el("h4", { text: when }), el("p", { text: by.get(when)?.trim() || (by.has(when) ? "(nothing)" : "not asked yet") }));
      list.replaceChildren(
        ...[...answers].map(([prompt, by]) =>
          el("figure", {}, el("figcaption", { text: prompt }), el("div", { class: "pair" }, answer(by, "before"), answer(by, "after"))),
        ),
      );
    },
  };
}

function storyBox() {
  const list = el("ol", { class: "story", "aria-label": "What happened, newest first" });
  const element = part("Story", list);
  const keyed = new KeyedList(list, (event) => ({
    element: el(
      "li",
      { "data-kind": event.kind },
      el("time", { datetime: event.at, title: f.words(event.at), text: f.clock(event.at) }),
      el("span", { text: f.eventWords(event) }),
    ),
    update() {},
  }));
  return {
    element,
    show: (story) => keyed.show(story.filter((event) => event.kind !== "sample").toReversed(), (event) => event.id),
  };
}
