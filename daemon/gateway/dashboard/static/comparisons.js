// Comparisons: their list; and one of them, its losses, its votes, and all answers side by side.

import { el, mark, plain } from "./dom.js";
import { ask } from "./store.js";
import * as f from "./format.js";

/** Build the list of comparisons into an element; returns how to end it. */
export function comparisonList(view) {
  const list = el("div", { class: "comparisons" });
  view.replaceChildren(
    el("article", {}, back("#/", "Overview"), el("header", { class: "heading" }, el("h1", { text: "Comparisons" })), list),
  );
  document.title = "Comparisons · brightrun trainer";
  return read(view, list, "/dashboard/comparisons", ({ comparisons }) => {
    if (!comparisons.length) {
      list.replaceChildren(
        el("p", { class: "empty", text: "None yet. `brightrun-trainer compare JOB` on a GPU host asks adapters and their base the same prompts." }),
      );
      return;
    }
    list.replaceChildren(...comparisons.map(listed));
  });
}

function listed(row) {
  const names = namesOf(row).join(", ");
  return el(
    "div",
    { class: "short", "data-comparison": row.id },
    el(
      "a",
      { class: "name", href: `#/comparisons/${encodeURIComponent(row.id)}` },
      el("b", { text: names }),
      el("span", { class: "muted", text: f.words(row.base_model) }),
    ),
    el(
      "div",
      { class: "remark" },
      el("span", { text: counted(row.prompts, "prompt") + (row.votes ? `, ${counted(row.votes, "vote")}` : "") }),
      el("span", { class: "muted", text: f.clock(row.created_at) }),
    ),
  );
}

/** Build the page of a comparison into an element; returns how to end it. */
export function comparisonPage(view, id) {
  const page = el("article", { class: "comparison" }, back("#/comparisons", "Comparisons"));
  view.replaceChildren(page);
  return read(view, page, `/dashboard/comparisons/${encodeURIComponent(id)}`, (told) => {
    const { comparison } = told;
    const names = namesOf(comparison);
    document.title = plain(`${names.join(", ")} · brightrun trainer`);
    page.replaceChildren(
      back("#/comparisons", "Comparisons"),
      el(
        "header",
        { class: "heading" },
        el(
          "div",
          {},
          el("h1", { text: names.join(", ") }),
          el("p", { class: "muted about", text: aboutWords(comparison) }),
        ),
        el("a", { class: "button primary", id: "vote", href: `#/comparisons/${encodeURIComponent(id)}/vote`, text: "Vote blind" }),
      ),
      ...comparison.notes.map((note) => el("p", { class: "remark-line", text: f.words(note) })),
      lossPart(comparison, names),
      votePart(told.tallies, names),
      el(
        "section",
        { class: "part" },
        el("h2", { text: "Answers" }),
        el("div", { class: "samples" }, ...told.prompts.map((prompt) => promptFigure(prompt, names))),
        told.more ? el("p", { class: "muted", text: `Only the first ${told.prompts.length} prompts are shown.` }) : null,
      ),
    );
  });
}

export const back = (href, text) => el("a", { class: "back", href, text: `← ${text}` });
export const namesOf = (row) => row.contestants.map((contestant) => f.words(contestant?.name));

/** The turns of a prompt, and its answers if they are given: [name, answer] each. */
export function promptFigure(prompt, names) {
  return el(
    "figure",
    { "data-number": prompt.number },
    promptCaption(prompt),
    el(
      "div",
      { class: "answers" },
      ...names.map((name, place) => answerBox(name, prompt.answers[place])),
    ),
    prompt.reference ? el("div", { class: "reference" }, el("h4", { text: "in the data" }), el("p", { text: prompt.reference })) : null,
  );
}

export function promptCaption(prompt) {
  const last = prompt.turns.length - 1;
  return el(
    "figcaption",
    {},
    ...prompt.turns.map((turn, place) =>
      el(
        "p",
        { class: place === last ? null : "earlier" },
        place === last ? null : el("span", { class: "role", text: `${f.words(turn.role)}: ` }),
        document.createTextNode(plain(turn.content)),
      ),
    ),
  );
}

export function answerBox(name, answer) {
  return el(
    "div",
    {},
    el("h4", { text: name }),
    el(
      "p",
      {},
      document.createTextNode(plain(f.words(answer?.text).trim() || "(nothing)")),
      answer?.cut ? el("span", { class: "muted", text: " … (cut)" }) : null,
    ),
  );
}

export function tallyTable(tallies, names) {
  return el(
    "div",
    { class: "tallies" },
    ...tallies.map((tally) =>
      el(
        "div",
        { class: "tally", "data-kind": tally.kind },
        el("h4", {
          text: [
            tally.kind === "judge" ? `Judge ${f.words(tally.judge)}` : counted(tally.voters, "person", "people"),
            `${names[tally.one]} and ${names[tally.two]}`,
          ].join(" · "),
        }),
        el("p", { text: tally.words }),
      ),
    ),
  );
}

export const counted = (number, one, many = `${one}s`) => `${f.count(number)} ${number === 1 ? one : many}`;

function aboutWords(comparison) {
  const options = comparison.options ?? {};
  return [
    f.words(comparison.base_model),
    comparison.prompts_are_held_out ? "prompts that the jobs held out" : "prompts of a file",
    options.temperature ? `temperature ${f.words(options.temperature)}` : "greedy answers",
    f.clock(comparison.created_at),
  ].join(" · ");
}

function lossPart(comparison, names) {
  const sets = comparison.held_out;
  if (!sets.length) return null;
  const isOne = new Set(sets.map((set) => set.digest)).size === 1 && sets.some((set) => set.set === "common");
  const shown = isOne ? sets.filter((set) => set.set === "common") : sets;
  const cell = (set, name) => el("td", { text: f.isNumber(set.losses[name]) ? set.losses[name].toFixed(4) : "–" });
  const title = (set) => (set.set === "common" ? "the same for all" : f.words(set.set));
  const unknown = shown.flatMap((set) => set.may_have_been_trained_on_by ?? []);
  return el(
    "section",
    { class: "part" },
    el("h2", { text: "Held-out loss" }),
    el(
      "table",
      { class: "losses" },
      el("thead", {}, el("tr", {}, el("td"), ...names.map((name) => el("th", { scope: "col", text: name })))),
      el(
        "tbody",
        {},
        ...shown.map((set) =>
          el(
            "tr",
            {},
            el(
              "th",
              { scope: "row" },
              el("span", { text: title(set) }),
              el("span", { class: "muted small", text: `${counted(set.answers, "answer")} of ${counted(set.conversations, "conversation")}` }),
            ),
            ...names.map((name) => cell(set, name)),
          ),
        ),
      ),
    ),
    shown.length > 1 ? el("p", { class: "muted small", text: "Losses compare within a line only: each line is another text." }) : null,
    unknown.length
      ? el("p", { class: "warn small", text: `It is not known whether these were trained on what is the same for all: ${unknown.join(", ")}.` })
      : null,
  );
}

function votePart(tallies, names) {
  if (!tallies.length) return null;
  return el("section", { class: "part", id: "votes" }, el("h2", { text: "Preferred" }), tallyTable(tallies, names));
}

/** Read once and show; what fails is said in place. */
function read(view, place, path, show) {
  let ended = false;
  mark(view, "aria-busy", "true");
  ask(path)
    .then((told) => ended || show(told))
    .catch((error) => ended || place.append(el("p", { class: "empty", role: "alert", text: error.message })))
    .finally(() => ended || mark(view, "aria-busy", "false"));
  return () => {
    ended = true;
    document.title = "brightrun trainer";
  };
}
