// How numbers and instants are said: short, with their unit, as the command line says them.

const UNKNOWN = "–";
const grouped = new Intl.NumberFormat("en-US");

export const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

/** The text of anything that a row may hold. */
export function words(value) {
  if (value === null || value === undefined) return "";
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

/** A length of time in two units at most: 8s, 4m 05s, 3h 12m, 5d 2h. */
export function span(seconds) {
  if (!isNumber(seconds)) return UNKNOWN;
  const s = Math.max(seconds, 0);
  const two = (n) => String(Math.floor(n)).padStart(2, "0");
  if (s < 60) return `${Math.floor(s)}s`;
  if (s < 3600) return `${Math.floor(s / 60)}m ${two(s % 60)}s`;
  if (s < 86400) return `${Math.floor(s / 3600)}h ${two((s % 3600) / 60)}m`;
  return `${Math.floor(s / 86400)}d ${Math.floor((s % 86400) / 3600)}h`;
}

/** How long ago, in one unit. */
export const ago = (seconds) => (isNumber(seconds) ? (seconds < 2 ? "now" : `${span(seconds).split(" ")[0]} ago`) : UNKNOWN);

export const money = (dollars) =>
  isNumber(dollars) ? `$${dollars.toLocaleString("en-US", { minimumFractionDigits: 2, maximumFractionDigits: 2 })}` : UNKNOWN;

export const loss = (value) => (isNumber(value) ? value.toFixed(3) : UNKNOWN);
export const percent = (value) => (isNumber(value) ? `${Math.round(value)} %` : UNKNOWN);
export const count = (value) => (isNumber(value) ? grouped.format(Math.round(value)) : UNKNOWN);

/** Bytes in decimal units, as disks count them. */
export function size(bytes) {
  if (!isNumber(bytes)) return UNKNOWN;
  let value = bytes;
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (value < 1000) return unit === "B" || value >= 100 ? `${Math.round(value)} ${unit}` : `${value.toFixed(1)} ${unit}`;
    value /= 1000;
  }
  return `${value.toFixed(1)} TB`;
}

/** The reader's own wall clock; the date only when it is not today. */
export function clock(instant) {
  const at = new Date(instant);
  if (!instant || Number.isNaN(at.getTime())) return UNKNOWN;
  const time = at.toLocaleTimeString("en-GB");
  return at.toDateString() === new Date().toDateString()
    ? time
    : `${at.toLocaleDateString("en-GB", { day: "numeric", month: "short" })} ${time.slice(0, 5)}`;
}

export const shortId = (id) => words(id).slice(0, 8);
/** A model's name without its maker. */
export const shortModel = (model) => (model ? words(model).split("/").pop() : "default model");
export const metric = (job, name) => (job.metrics && isNumber(job.metrics[name]) ? job.metrics[name] : null);

// The message of these says what went wrong; that of any other kind is a sentence of its own.
const FAULTS = {
  failed: "Failed",
  reaped: "Taken back from a host that fell silent",
  retrying: "Goes back to the queue for another attempt",
};

/** What happened, in one line. */
export function eventWords(event) {
  const data = event.data ?? {};
  let said = words(event.message) || words(event.kind);
  if (Object.hasOwn(FAULTS, event.kind)) said = `${FAULTS[event.kind]}: ${said}`;
  if (isNumber(data.cost) && ["completed", "failed", "cancelled"].includes(event.kind)) said += ` (${money(data.cost)})`;
  return said;
}
