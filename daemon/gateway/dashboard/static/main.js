// The page's frame: who is signed in, which view is shown, the theme, how the stream fares.

import { el, say, mark } from "./dom.js";
import { state, watch, connect, disconnect, ask } from "./store.js";
import { overview } from "./overview.js";
import { jobPage } from "./job.js";
import { comparisonList, comparisonPage } from "./comparisons.js";
import { blindPage } from "./blind.js";
import { clock } from "./format.js";

const view = document.getElementById("view");
const link = document.getElementById("link");
const away = document.getElementById("away");
const themeButton = document.getElementById("theme");
const toComparisons = document.getElementById("to-comparisons");
const signOutButton = document.getElementById("sign-out");

let endView = () => {};
let signedIn = false;

function show() {
  endView();
  endView = () => {};
  view.replaceChildren();
  if (!signedIn) return login();
  endView = viewOf(location.hash);
  window.scrollTo(0, 0);
}

function viewOf(hash) {
  const [, kind, id, deeper] = /^#\/(jobs|comparisons)(?:\/([0-9a-fA-F-]{36}))?(\/vote)?$/.exec(hash) ?? [];
  if (kind === "jobs" && id && !deeper) return jobPage(view, id.toLowerCase());
  if (kind !== "comparisons") return overview(view);
  if (!id) return comparisonList(view);
  return deeper ? blindPage(view, id.toLowerCase()) : comparisonPage(view, id.toLowerCase());
}

function setSignedIn(value) {
  signedIn = value;
  toComparisons.hidden = !value;
  signOutButton.hidden = !value;
  link.hidden = !value;
  if (value) connect(() => setSignedIn(false));
  else disconnect();
  show();
}

function login() {
  mark(view, "aria-busy", "false");
  const key = el("input", {
    id: "key",
    type: "password",
    autocomplete: "current-password",
    required: true,
    "aria-describedby": "key-help",
  });
  const fault = el("p", { class: "fault", role: "alert", hidden: true });
  const button = el("button", { class: "primary", type: "submit", text: "Sign in" });
  const form = el(
    "form",
    {
      class: "login",
      on: {
        submit: async (event) => {
          event.preventDefault();
          button.disabled = true;
          fault.hidden = true;
          try {
            await ask("/dashboard/login", { method: "POST", body: { key: key.value } });
            setSignedIn(true);
          } catch (error) {
            say(fault, error.message);
            fault.hidden = false;
            button.disabled = false;
            key.select();
          }
        },
      },
    },
    el("h1", { text: "Sign in" }),
    el("label", { for: "key", text: "Key of the gateway" }),
    key,
    el("p", { class: "muted", id: "key-help", text: "One of TRAINER_GATEWAY_KEYS. It opens every job." }),
    fault,
    button,
  );
  view.replaceChildren(form);
  key.focus();
}

function showLink() {
  const said = { live: "Live", connecting: "Connecting…", reconnecting: "Reconnecting…" }[state.link];
  mark(link, "data-link", state.away ? "away" : state.link);
  say(link.lastElementChild, state.away ? "Database away" : said);
  away.hidden = !(signedIn && state.away);
  say(away, state.away ? `The database has not answered since ${clock(state.away)}. What stands here is older; trainings go on.` : "");
}

const isDark = () => document.documentElement.dataset.theme === "dark";

function nameTheme() {
  say(themeButton, isDark() ? "Light" : "Dark");
  mark(themeButton, "aria-label", isDark() ? "Use light colours" : "Use dark colours");
}

themeButton.addEventListener("click", () => {
  window.dispatchEvent(new CustomEvent("theme", { detail: isDark() ? "light" : "dark" }));
});
new MutationObserver(nameTheme).observe(document.documentElement, { attributeFilter: ["data-theme"] });
nameTheme();

signOutButton.addEventListener("click", async () => {
  try {
    await ask("/dashboard/logout", { method: "POST" });
  } finally {
    setSignedIn(false);
  }
});
window.addEventListener("hashchange", () => {
  show();
  view.focus({ preventScroll: true });
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  view.focus();
});
watch(showLink);

const known = await fetch("/dashboard/session").catch(() => null);
setSignedIn(known?.status === 204);
