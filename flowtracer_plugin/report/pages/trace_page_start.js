/** The switch for colours, and the token that the address names. */
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const themes = [["", "◐", "auto", "as the system"], ["light", "○", "light", "light"], ["dark", "●", "dark", "dark"]];
  let theme = 0;
  button.addEventListener("click", () => {
    theme = (theme + 1) % themes.length;
    const [name, sign, short, said] = themes[theme];
    root.classList.remove("light", "dark");
    if (name) root.classList.add(name);
    button.firstChild.data = sign;
    button.lastChild.textContent = ` ${short}`;
    button.setAttribute("aria-label", `Colours: ${said}`);
  });

  function follow(hash) {
    const linked = /^#t(\d+)$/.exec(hash);
    if (linked && Number(linked[1]) < trace.tokenCount) text.goTo(trace.unitOf(Number(linked[1])));
  }
  addEventListener("hashchange", () => follow(location.hash));
  document.querySelector("nav").addEventListener("click", (event) => {
    if (!event.target.matches("a") || !root.classList.contains("selecting")) return;
    event.preventDefault(); // the address holds the selection
    document.querySelector(event.target.hash).scrollIntoView();
  });
  // In the srcdoc of a frame, a link would load the page around the frame into it.
  if (location.protocol === "about:") addEventListener("click", (event) => {
    const hash = event.target.closest('a[href^="#"]')?.hash;
    if (!hash || event.defaultPrevented) return;
    event.preventDefault();
    document.querySelector(hash)?.scrollIntoView();
    follow(hash);
  });
  follow(location.hash);
})();
