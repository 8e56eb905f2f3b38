// Before anything is painted: the theme that was chosen here, else the system's, and it is followed when it changes.
// The style sheet knows the attribute alone, so that each theme's colours stand there once.
{
  const system = matchMedia("(prefers-color-scheme: dark)");
  const ofSystem = () => (system.matches ? "dark" : "light");
  const root = document.documentElement;
  const set = () => {
    const chosen = localStorage.getItem("theme");
    root.dataset.theme = chosen === "dark" || chosen === "light" ? chosen : ofSystem();
  };
  set();
  system.addEventListener("change", set);
  // Other tabs, and this one: main.js writes the choice and says so. A choice that is the system's own is none.
  addEventListener("storage", set);
  addEventListener("theme", ({ detail }) => {
    if (detail === ofSystem()) localStorage.removeItem("theme");
    else localStorage.setItem("theme", detail);
    set();
  });
}
