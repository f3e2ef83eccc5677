ALTER TABLE `events` ADD `outages` integer DEFAULT 0 NOT NULL;--> statement-breakpoint
ALTER TABLE `outcomes` ADD `outages` integer DEFAULT 0 NOT NULL;